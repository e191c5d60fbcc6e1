//! [`Cron`]: a cron expression in a time zone, as slots.
//!
//! The expression is matched against the calendar alone. A slot is the first instant at which the clock on the wall of
//! the zone shows a matching time or has jumped over it. So a time that does not exist is a slot when the clocks have
//! gone forward, several of them are one, and a time that there is twice is a slot the first time. The rule is the same
//! for all expressions, which is why `croner`, whose own answer depends on the expression, never sees the zone.

use std::fmt;

use chrono::{DateTime, LocalResult, NaiveDateTime, TimeZone, Utc};
use chrono_tz::{GapInfo, Tz};
use croner::parser::{CronParser, Seconds, Year};
use leasehold_domain::{Invalid, Slots};

/// Five fields, or six with the seconds first, and a zone of the IANA database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cron {
    text: String,
    pattern: croner::Cron,
    pub(crate) zone: Tz,
}

impl Cron {
    pub(crate) fn new(text: &str, zone: &str) -> Result<Self, Invalid> {
        let parser = CronParser::builder()
            .seconds(Seconds::Optional)
            .year(Year::Disallowed)
            .build();
        let pattern = parser
            .parse(text)
            .map_err(|error| Invalid::new("schedule", error.to_string()))?;
        let zone = zone
            .parse()
            .map_err(|_| Invalid::new("time_zone", "a name of the IANA database, such as Europe/Berlin"))?;
        let cron = Self {
            text: text.trim().to_owned(),
            pattern,
            zone,
        };
        if cron.next_after(DateTime::UNIX_EPOCH).is_none() {
            return Err(Invalid::new("schedule", "no day matches this expression"));
        }
        Ok(cron)
    }

    /// When the clock of the zone first shows a time, or has jumped over it.
    fn first_instant(&self, local: NaiveDateTime) -> Option<DateTime<Utc>> {
        let instant = match self.zone.from_local_datetime(&local) {
            LocalResult::Single(instant) | LocalResult::Ambiguous(instant, _) => instant,
            LocalResult::None => GapInfo::new(&local, &self.zone)?.end?,
        };
        Some(instant.with_timezone(&Utc))
    }

    fn local(&self, instant: DateTime<Utc>) -> NaiveDateTime {
        instant.with_timezone(&self.zone).naive_local()
    }
}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Slots for Cron {
    fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        // What matches until here on the calendar began until here: later times never begin sooner.
        let mut local = self.local(after);
        loop {
            let next = self.pattern.find_next_occurrence(&local.and_utc(), false).ok()?;
            local = next.naive_utc();
            // In an hour that there is twice, the times that follow have been; so have those in a gap that has passed.
            match self.first_instant(local) {
                Some(slot) if slot > after => return Some(slot),
                _ => {}
            }
        }
    }

    fn latest_until(&self, until: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let local = self.local(until).and_utc();
        let before = self.pattern.find_previous_occurrence(&local, true).ok()?;
        let mut latest = self.first_instant(before.naive_utc())?;
        // In an hour that there is twice, later times of the calendar may have been as well.
        while let Some(next) = self.next_after(latest).filter(|next| *next <= until) {
            latest = next;
        }
        Some(latest)
    }
}

#[cfg(test)]
mod tests {
    use chrono::{TimeDelta, Timelike};
    use chrono_tz::TZ_VARIANTS;
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn slots(cron: &Cron, after: &str, until: &str) -> Vec<String> {
        let (mut at, until) = (self::at(after), self::at(until));
        let mut slots = Vec::new();
        while let Some(next) = cron.next_after(at).filter(|next| *next <= until) {
            slots.push(next.format("%dT%H:%MZ").to_string());
            at = next;
        }
        slots
    }

    fn berlin(text: &str) -> Cron {
        Cron::new(text, "Europe/Berlin").unwrap()
    }

    #[test]
    fn a_time_that_does_not_exist_is_a_slot_when_the_clocks_have_gone_forward() {
        // From 02:00 to 03:00, which is 01:00Z.
        let (from, to) = ("2026-03-27T12:00:00Z", "2026-03-30T12:00:00Z");
        let daily = slots(&berlin("30 2 * * *"), from, to);
        assert_eq!(daily, ["28T01:30Z", "29T01:00Z", "30T00:30Z"]);
        // Four times that do not exist are one slot, and it is that of 03:00 as well.
        let quarters = slots(
            &berlin("*/15 * * * *"),
            "2026-03-29T00:30:00Z",
            "2026-03-29T01:15:00Z",
        );
        assert_eq!(quarters, ["29T00:45Z", "29T01:00Z", "29T01:15Z"]);
    }

    #[test]
    fn a_time_that_there_is_twice_is_one_slot() {
        // From 03:00 back to 02:00, which is 01:00Z.
        let (from, to) = ("2026-10-23T12:00:00Z", "2026-10-26T12:00:00Z");
        let daily = slots(&berlin("30 2 * * *"), from, to);
        assert_eq!(daily, ["24T00:30Z", "25T00:30Z", "26T01:30Z"]);
        let quarters = slots(
            &berlin("*/15 * * * *"),
            "2026-10-25T00:30:00Z",
            "2026-10-25T02:15:00Z",
        );
        assert_eq!(quarters, ["25T00:45Z", "25T02:00Z", "25T02:15Z"]);
        let latest = |until| berlin("*/15 * * * *").latest_until(at(until)).unwrap();
        assert_eq!(latest("2026-10-25T01:10:00Z"), at("2026-10-25T00:45:00Z"));
        assert_eq!(latest("2026-10-25T01:59:59.999Z"), at("2026-10-25T00:45:00Z"));
    }

    /// Why the library is not asked with the zone: what a clock change does to a time depends on how it is written.
    #[test]
    fn croner_alone_has_another_rule_for_each_kind_of_expression() {
        let alone = |text: &str, after: &str, until: &str| -> Vec<String> {
            let zone: Tz = "Europe/Berlin".parse().unwrap();
            let from = at(after).with_timezone(&zone);
            let pattern: croner::Cron = text.parse().unwrap();
            let slots = pattern.iter_after(from).map(|slot| slot.with_timezone(&Utc));
            slots
                .take_while(|slot| *slot <= at(until))
                .map(|slot| slot.format("%dT%H:%MZ").to_string())
                .collect()
        };
        let spring = ("2026-03-28T12:00:00Z", "2026-03-29T12:00:00Z");
        assert_eq!(alone("30 2 * * *", spring.0, spring.1), ["29T01:00Z"]);
        assert!(alone("0,30 2 * * *", spring.0, spring.1).is_empty(), "it skips");
        assert_eq!(slots(&berlin("0,30 2 * * *"), spring.0, spring.1), ["29T01:00Z"]);
        let autumn = ("2026-10-24T12:00:00Z", "2026-10-25T12:00:00Z");
        assert_eq!(alone("30 2 * * *", autumn.0, autumn.1), ["25T00:30Z"]);
        let twice = ["25T00:00Z", "25T00:30Z", "25T01:00Z", "25T01:30Z"];
        assert_eq!(alone("0,30 2 * * *", autumn.0, autumn.1), twice, "it doubles");
        assert_eq!(slots(&berlin("0,30 2 * * *"), autumn.0, autumn.1), twice[..2]);
    }

    /// Samoa had no 30 December 2011.
    #[test]
    fn a_day_that_does_not_exist_is_a_slot_when_the_next_begins() {
        let noon = Cron::new("0 12 * * *", "Pacific/Apia").unwrap();
        let around = slots(&noon, "2011-12-29T12:00:00Z", "2011-12-31T00:00:00Z");
        assert_eq!(around, ["29T22:00Z", "30T10:00Z", "30T22:00Z"]);
    }

    #[test]
    fn utc_has_seconds_and_nicknames() {
        let every_second = Cron::new("* * * * * *", "UTC").unwrap();
        let now = at("2026-05-01T00:00:00.5Z");
        assert_eq!(every_second.latest_until(now), Some(at("2026-05-01T00:00:00Z")));
        assert_eq!(every_second.next_after(now), Some(at("2026-05-01T00:00:01Z")));
        let daily = Cron::new("@daily", "UTC").unwrap();
        assert_eq!(daily.next_after(now), Some(at("2026-05-02T00:00:00Z")));
        let fridays = Cron::new("0 0 * * FRI", "UTC").unwrap();
        assert_eq!(fridays.next_after(now), Some(at("2026-05-08T00:00:00Z")));
    }

    #[test]
    fn bad_expressions_and_zones_are_refused() {
        for text in [
            "",
            "* * * *",
            "60 * * * *",
            "0 0 30 2 *",
            "0 0 0 1 1 * 2020",
            "every 5m",
            "a b c d e",
        ] {
            assert_eq!(
                Cron::new(text, "UTC").unwrap_err().field(),
                "schedule",
                "{text:?}"
            );
        }
        for zone in ["", "Berlin", "europe/berlin", "+01:00", "CET-1CEST"] {
            assert_eq!(
                Cron::new("0 0 * * *", zone).unwrap_err().field(),
                "time_zone",
                "{zone:?}"
            );
        }
    }

    /// The slots in a window by going through it minute by minute, with an eye on the highest time that the clock on the
    /// wall has shown.
    fn by_looking(cron: &Cron, from: DateTime<Utc>, until: DateTime<Utc>) -> Vec<DateTime<Utc>> {
        let minute = TimeDelta::minutes(1);
        let mut now = from - TimeDelta::days(1);
        let mut shown = cron.local(now);
        let mut slots = Vec::new();
        while now < until {
            now += minute;
            let mut reached = false;
            while shown < cron.local(now) {
                shown += minute;
                reached |= cron.pattern.is_time_matching(&shown.and_utc()).unwrap();
            }
            if reached && now > from {
                slots.push(now);
            }
        }
        slots
    }

    fn pattern() -> impl Strategy<Value = String> {
        let minutes = prop_oneof![
            Just("*".to_owned()),
            Just("*/7".to_owned()),
            (0..60_u32).prop_map(|m| m.to_string())
        ];
        let hours = prop_oneof![
            Just("*".to_owned()),
            Just("*/2".to_owned()),
            (0..24_u32).prop_map(|h| h.to_string())
        ];
        let days = prop_oneof![Just("* * *"), Just("* * SUN"), Just("*/2 * *")];
        (minutes, hours, days).prop_map(|(minutes, hours, days)| format!("{minutes} {hours} {days}"))
    }

    /// The moments between 1985 and 2035 at which a zone changed its clocks.
    fn changes(zone: Tz) -> Vec<DateTime<Utc>> {
        use chrono::Offset;
        let offset = |at: DateTime<Utc>| zone.offset_from_utc_datetime(&at.naive_utc()).fix();
        let (mut from, end) = (at("1985-01-01T00:00:00Z"), at("2035-01-01T00:00:00Z"));
        let mut changes = Vec::new();
        while from < end {
            let to = from + TimeDelta::days(7);
            let (mut before, mut after) = (from, to);
            if offset(before) != offset(after) {
                while after - before > TimeDelta::minutes(1) {
                    let middle = before + (after - before) / 2;
                    let middle = middle.with_second(0).unwrap();
                    if middle <= before {
                        break;
                    }
                    if offset(middle) == offset(before) {
                        before = middle;
                    } else {
                        after = middle;
                    }
                }
                changes.push(after);
            }
            from = to;
        }
        changes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn in_any_zone_no_slot_is_skipped_or_doubled(
            zone in prop::sample::select(&TZ_VARIANTS[..]),
            text in pattern(),
            change in any::<prop::sample::Index>(),
        ) {
            let cron = Cron::new(&text, zone.name()).unwrap();
            let changes = changes(zone);
            let middle = match changes.len() {
                0 => at("2026-03-29T01:00:00Z"),
                count => changes[change.index(count)],
            };
            let (from, until) = (middle - TimeDelta::hours(14), middle + TimeDelta::hours(26));
            let expected = by_looking(&cron, from, until);
            let mut found = Vec::new();
            let mut at = from;
            while let Some(next) = cron.next_after(at).filter(|next| *next <= until) {
                prop_assert!(next > at);
                found.push(next);
                at = next;
            }
            prop_assert_eq!(&found, &expected);
            for (index, slot) in found.iter().enumerate() {
                prop_assert_eq!(cron.latest_until(*slot), Some(*slot));
                if let Some(next) = found.get(index + 1) {
                    prop_assert_eq!(cron.latest_until(*next - TimeDelta::microseconds(1)), Some(*slot));
                }
            }
        }

        #[test]
        fn any_moment_lies_between_two_neighbours(
            zone in prop::sample::select(&TZ_VARIANTS[..]),
            text in pattern(),
            micros in 0_i64..4_000_000_000_000_000,
        ) {
            let cron = Cron::new(&text, zone.name()).unwrap();
            let now = DateTime::from_timestamp_micros(micros).unwrap();
            let (latest, next) = (cron.latest_until(now).unwrap(), cron.next_after(now).unwrap());
            prop_assert!(latest <= now && now < next);
            prop_assert_eq!(cron.next_after(latest), Some(next));
        }
    }
}
