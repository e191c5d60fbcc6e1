//! Slots: the moments at which a job runs once, however many processes there are. Only arithmetic: what time it is, the
//! caller says, by the clock of its database.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::Invalid;

/// How late a slot may start and still be no missed one, if the next has not begun: a deployment, or a database that was
/// away for some seconds.
const ON_TIME: TimeDelta = TimeDelta::minutes(1);

/// How often the run of one slot is begun before it is given up.
pub const MAX_TRIES: i32 = 3;

/// An ordered set of moments.
pub trait Slots {
    /// The first slot that lies after `after`; `None` when there are no more.
    fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>>;

    /// The last slot that does not lie after `until`; `None` when there was none yet.
    fn latest_until(&self, until: DateTime<Utc>) -> Option<DateTime<Utc>>;
}

/// The time between two slots, 100 ms to 366 days in whole milliseconds. Written as `every 30m`.
///
/// ```
/// use std::time::Duration;
/// use leasehold_domain::Interval;
///
/// let half_hour = Interval::new(Duration::from_secs(1800))?;
/// assert_eq!(half_hour.to_string(), "every 30m");
/// assert_eq!("every 30m".parse(), Ok(half_hour));
/// # Ok::<(), leasehold_domain::Invalid>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Interval {
    millis: i64,
}

/// The units in which an interval is written, each with its milliseconds; the largest that fits is taken.
const UNITS: [(&str, i64); 5] = [
    ("d", 24 * 60 * 60 * 1000),
    ("h", 60 * 60 * 1000),
    ("m", 60 * 1000),
    ("s", 1000),
    ("ms", 1),
];

impl Interval {
    /// Checks the bounds.
    ///
    /// # Errors
    /// [`Invalid`] with the field `schedule` when it is shorter than 100 ms or longer than 366 days, or has a fraction of
    /// a millisecond.
    pub fn new(every: Duration) -> Result<Self, Invalid> {
        let millis = i64::try_from(every.as_millis()).unwrap_or(i64::MAX);
        let whole = every.subsec_nanos().is_multiple_of(1_000_000);
        if whole && (100..=366 * 24 * 60 * 60 * 1000).contains(&millis) {
            Ok(Self { millis })
        } else {
            Err(Invalid::new(
                "schedule",
                format!("{every:?} is not between 100 ms and 366 days in whole milliseconds"),
            ))
        }
    }

    /// The slots that are counted from `from`: one interval after it, two, three, and so on.
    #[must_use]
    pub fn counted_from(self, from: DateTime<Utc>) -> IntervalSlots {
        IntervalSlots { from, every: self }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, millis) = UNITS
            .into_iter()
            .find(|(_, millis)| self.millis % millis == 0)
            .unwrap_or(("ms", 1));
        write!(f, "every {}{unit}", self.millis / millis)
    }
}

impl FromStr for Interval {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let read = || {
            let length = text.strip_prefix("every ")?;
            let digits = length.find(|c: char| !c.is_ascii_digit())?;
            let (count, unit) = length.split_at(digits);
            let (_, millis) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
            let millis = count.parse::<u64>().ok()?.checked_mul(millis.unsigned_abs())?;
            Some(Duration::from_millis(millis))
        };
        let every =
            read().ok_or_else(|| Invalid::new("schedule", "an interval is written as `every 30m`"))?;
        Self::new(every)
    }
}

/// Slots at equal distances; made by [`Interval::counted_from`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntervalSlots {
    from: DateTime<Utc>,
    every: Interval,
}

impl IntervalSlots {
    /// How many slots there were until `until`.
    fn count_until(&self, until: DateTime<Utc>) -> i64 {
        let passed = until.timestamp_micros() - self.from.timestamp_micros();
        passed.div_euclid(self.every.millis * 1000).max(0)
    }

    fn at(&self, count: i64) -> Option<DateTime<Utc>> {
        let after = TimeDelta::try_milliseconds(self.every.millis.checked_mul(count)?)?;
        // A slot is kept in a database that knows microseconds.
        DateTime::from_timestamp_micros(self.from.timestamp_micros())?.checked_add_signed(after)
    }
}

impl Slots for IntervalSlots {
    fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.at(self.count_until(after) + 1)
    }

    fn latest_until(&self, until: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self.count_until(until) {
            0 => None,
            count => self.at(count),
        }
    }
}

/// What becomes of slots that nobody started in time: no process lived, the database was away, or the job still ran.
///
/// A slot counts as missed once the next has begun, when the job ran as it began, or after a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MissedSlots {
    /// They are passed over.
    Skip,
    /// The latest of them is run, for all.
    #[default]
    RunOnce,
    /// Each is run, in order.
    RunAll,
}

impl MissedSlots {
    /// `skip`, `run_once` or `run_all`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::RunOnce => "run_once",
            Self::RunAll => "run_all",
        }
    }

    /// Reads back what [`MissedSlots::as_str`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Skip, Self::RunOnce, Self::RunAll]
            .into_iter()
            .find(|policy| policy.as_str() == text)
    }

    /// The slot to run at `now`, if there is one: all slots until `handled_until` are settled, and the job has not run
    /// since `idle_since`. Once it is taken, all slots until it are settled.
    pub fn due(
        self,
        slots: &impl Slots,
        handled_until: DateTime<Utc>,
        idle_since: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Option<DateTime<Utc>> {
        let latest = slots.latest_until(now).filter(|latest| *latest > handled_until)?;
        match self {
            Self::Skip => (latest > idle_since && now - latest <= ON_TIME).then_some(latest),
            Self::RunOnce => Some(latest),
            Self::RunAll => slots.next_after(handled_until),
        }
    }
}

/// What becomes of a slot whose run ended without an outcome: its process died, or lost the lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnCrash {
    /// It is run again, [`MAX_TRIES`] times in all.
    #[default]
    Retry,
    /// It is not run again.
    Skip,
}

impl OnCrash {
    /// `retry` or `skip`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Skip => "skip",
        }
    }

    /// Reads back what [`OnCrash::as_str`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Retry, Self::Skip]
            .into_iter()
            .find(|policy| policy.as_str() == text)
    }

    /// Whether a slot is run again after `tries` runs that ended without an outcome.
    pub fn runs_again(self, tries: i32) -> bool {
        self == Self::Retry && tries < MAX_TRIES
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    /// Slots at 10, 20, 30, … seconds.
    fn tens() -> IntervalSlots {
        Interval::new(Duration::from_secs(10))
            .unwrap()
            .counted_from(at(0))
    }

    #[test]
    fn the_first_slot_is_one_interval_after_the_registration() {
        assert_eq!(tens().latest_until(at(9)), None);
        assert_eq!(tens().next_after(at(-100)), Some(at(10)));
        assert_eq!(tens().next_after(at(0)), Some(at(10)));
        assert_eq!(tens().next_after(at(10)), Some(at(20)));
        assert_eq!(tens().latest_until(at(20)), Some(at(20)));
    }

    #[test]
    fn intervals_are_written_in_the_largest_unit() {
        for (millis, text) in [
            (100, "every 100ms"),
            (1_000, "every 1s"),
            (90_000, "every 90s"),
            (1_800_000, "every 30m"),
            (7_200_000, "every 2h"),
            (86_400_000, "every 1d"),
        ] {
            let interval = Interval::new(Duration::from_millis(millis)).unwrap();
            assert_eq!(interval.to_string(), text);
            assert_eq!(text.parse(), Ok(interval));
        }
    }

    #[test]
    fn bad_intervals_are_refused() {
        for text in [
            "",
            "every",
            "every 1",
            "every m",
            "every -1m",
            "every 1y",
            "30m",
            "every 99ms",
            "every 367d",
        ] {
            let refused = text.parse::<Interval>().unwrap_err();
            assert_eq!(refused.field(), "schedule", "{text:?}");
        }
        assert!(format!("every {}d", u64::MAX).parse::<Interval>().is_err());
        assert!(Interval::new(Duration::from_micros(1_000_500)).is_err());
        assert!(Interval::new(Duration::MAX).is_err());
    }

    #[test]
    fn a_slot_on_time_is_due_under_every_policy() {
        for policy in [MissedSlots::Skip, MissedSlots::RunOnce, MissedSlots::RunAll] {
            assert_eq!(policy.due(&tens(), at(10), at(11), at(19)), None);
            assert_eq!(policy.due(&tens(), at(10), at(11), at(20)), Some(at(20)));
            assert_eq!(policy.due(&tens(), at(20), at(11), at(25)), None, "it is settled");
        }
    }

    /// 20 to 110 are missed, and 110 began 4 seconds ago.
    #[test]
    fn after_an_outage() {
        let due = |policy: MissedSlots| policy.due(&tens(), at(10), at(11), at(114));
        assert_eq!(due(MissedSlots::Skip), Some(at(110)), "the last one is on time");
        assert_eq!(due(MissedSlots::RunOnce), Some(at(110)));
        assert_eq!(due(MissedSlots::RunAll), Some(at(20)));
    }

    #[test]
    fn a_slot_that_began_during_a_run_is_missed() {
        let due = |policy: MissedSlots| policy.due(&tens(), at(10), at(23), at(24));
        assert_eq!(due(MissedSlots::Skip), None);
        assert_eq!(due(MissedSlots::RunOnce), Some(at(20)));
        assert_eq!(due(MissedSlots::RunAll), Some(at(20)));
    }

    #[test]
    fn a_slot_is_missed_after_a_minute() {
        let hours = Interval::new(Duration::from_secs(3600))
            .unwrap()
            .counted_from(at(0));
        let due = |now| MissedSlots::Skip.due(&hours, at(0), at(0), at(now));
        assert_eq!(due(3660), Some(at(3600)));
        assert_eq!(due(3661), None);
    }

    #[test]
    fn a_crash_is_tried_again_within_bounds() {
        let again = |policy: OnCrash| (1..=4).map(|tries| policy.runs_again(tries)).collect::<Vec<_>>();
        assert_eq!(again(OnCrash::Retry), [true, true, false, false]);
        assert_eq!(again(OnCrash::Skip), [false; 4]);
    }

    #[test]
    fn policies_read_back() {
        for policy in [MissedSlots::Skip, MissedSlots::RunOnce, MissedSlots::RunAll] {
            assert_eq!(MissedSlots::parse(policy.as_str()), Some(policy));
        }
        for policy in [OnCrash::Retry, OnCrash::Skip] {
            assert_eq!(OnCrash::parse(policy.as_str()), Some(policy));
        }
        assert_eq!(MissedSlots::parse("sometimes"), None);
        assert_eq!(OnCrash::parse(""), None);
    }

    prop_compose! {
        fn moment()(micros in -4_000_000_000_000_000_i64..4_000_000_000_000_000) -> DateTime<Utc> {
            DateTime::from_timestamp_micros(micros).unwrap()
        }
    }

    proptest! {
        #[test]
        fn no_slot_is_skipped_or_doubled(from in moment(), when in moment(), millis in 100_u64..40_000_000) {
            let every = TimeDelta::milliseconds(millis.try_into().unwrap());
            let slots = Interval::new(Duration::from_millis(millis)).unwrap().counted_from(from);
            let next = slots.next_after(when).unwrap();
            prop_assert!(next > when);
            prop_assert_eq!(slots.latest_until(next), Some(next));
            prop_assert_eq!(slots.next_after(next), Some(next + every));
            match slots.latest_until(when) {
                Some(latest) => {
                    prop_assert!(latest <= when);
                    prop_assert_eq!(latest + every, next);
                }
                None => prop_assert_eq!(next, from + every),
            }
        }

        /// However late the looks come, `run_all` takes every slot once and the others none twice.
        #[test]
        fn looks_at_any_time_settle_every_slot_once(
            looks in prop::collection::vec(0_i64..40, 1..60),
        ) {
            for policy in [MissedSlots::Skip, MissedSlots::RunOnce, MissedSlots::RunAll] {
                let (mut now, mut handled) = (at(0), at(0));
                let mut taken = Vec::new();
                for look in &looks {
                    now += TimeDelta::seconds(*look);
                    while let Some(slot) = policy.due(&tens(), handled, at(0), now) {
                        prop_assert!(slot > handled && slot <= now);
                        taken.push(slot);
                        handled = slot;
                    }
                }
                prop_assert!(taken.is_sorted_by(|a, b| a < b));
                if policy == MissedSlots::RunAll {
                    let all = now.timestamp() / 10;
                    prop_assert_eq!(taken, (1..=all).map(|count| at(count * 10)).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn any_interval_reads_back(millis in 100_u64..31_622_400_000) {
            let interval = Interval::new(Duration::from_millis(millis)).unwrap();
            prop_assert_eq!(interval.to_string().parse(), Ok(interval));
        }
    }
}
