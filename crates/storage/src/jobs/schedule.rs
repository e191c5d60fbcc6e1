//! [`Schedule`]: when a job runs, as it is written in code and kept in its row.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use leasehold_domain::{Interval, Invalid, Slots};

use crate::jobs::cron::Cron;

/// When a job runs: at an interval, or as a cron expression says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(Kind);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Interval(Interval),
    // The compiled expression is large.
    Cron(Box<Cron>),
}

impl Schedule {
    /// Once per interval, 100 ms to 366 days, counted from the registration of the job.
    ///
    /// # Errors
    /// [`Invalid`] with the field `schedule`.
    pub fn every(interval: Duration) -> Result<Self, Invalid> {
        Interval::new(interval).map(|interval| Self(Kind::Interval(interval)))
    }

    /// As a cron expression says, by the clock of a zone of the IANA database: minute, hour, day of the month, month and
    /// day of the week, with the seconds before them if there are six fields.
    ///
    /// A slot is when the clock of the zone first shows a matching time, or has jumped over it: where summer time begins,
    /// times that do not exist are one slot right after; where it ends, times that there are twice are slots once.
    ///
    /// # Errors
    /// [`Invalid`] with the field `schedule` or `time_zone`.
    pub fn cron(expression: &str, time_zone: &str) -> Result<Self, Invalid> {
        Cron::new(expression, time_zone).map(|cron| Self(Kind::Cron(Box::new(cron))))
    }

    /// Reads back what stands in a row.
    pub(crate) fn read(text: &str, time_zone: &str) -> Result<Self, Invalid> {
        match text.parse() {
            Ok(interval) => Ok(Self(Kind::Interval(interval))),
            Err(_) => Self::cron(text, time_zone),
        }
    }

    /// The name of the zone by whose clock it runs; `UTC` for an interval.
    pub fn time_zone(&self) -> &'static str {
        match &self.0 {
            Kind::Interval(_) => "UTC",
            Kind::Cron(cron) => cron.zone.name(),
        }
    }

    /// The slots of a job that was registered at `registered_at`.
    pub(crate) fn slots(self, registered_at: DateTime<Utc>) -> JobSlots {
        JobSlots {
            schedule: self,
            registered_at,
        }
    }
}

/// The expression, or `every 30m`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Interval(interval) => interval.fmt(f),
            Kind::Cron(cron) => cron.fmt(f),
        }
    }
}

/// The slots of one job.
#[derive(Debug)]
pub(crate) struct JobSlots {
    schedule: Schedule,
    registered_at: DateTime<Utc>,
}

impl Slots for JobSlots {
    fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match &self.schedule.0 {
            Kind::Interval(interval) => interval.counted_from(self.registered_at).next_after(after),
            Kind::Cron(cron) => cron.next_after(after),
        }
    }

    fn latest_until(&self, until: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match &self.schedule.0 {
            Kind::Interval(interval) => interval.counted_from(self.registered_at).latest_until(until),
            Kind::Cron(cron) => cron.latest_until(until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let interval = Schedule::every(Duration::from_secs(1800)).unwrap();
        let cron = Schedule::cron(" 30 2 * * MON-FRI", "Europe/Berlin").unwrap();
        for schedule in [&interval, &cron] {
            let read = Schedule::read(&schedule.to_string(), schedule.time_zone());
            assert_eq!(read.as_ref(), Ok(schedule));
        }
        assert_eq!(
            (interval.to_string().as_str(), interval.time_zone()),
            ("every 30m", "UTC")
        );
        assert_eq!(
            (cron.to_string().as_str(), cron.time_zone()),
            ("30 2 * * MON-FRI", "Europe/Berlin")
        );
    }
}
