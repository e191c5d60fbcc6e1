//! A group: lanes that are compared with each other, and the table that comes out.

use std::fmt::Write;
use std::time::Duration;

use crate::Result;
use crate::measure::{Lane, Sample};

/// Lanes that do the same thing in different ways.
pub(crate) struct Group {
    title: String,
    unit: &'static str,
    lanes: Vec<Box<dyn Lane>>,
    /// The lanes that all others are divided by.
    bases: Vec<&'static str>,
}

impl Group {
    pub(crate) fn new(title: impl Into<String>, unit: &'static str, bases: &[&'static str]) -> Self {
        Self {
            title: title.into(),
            unit,
            lanes: Vec::new(),
            bases: bases.to_vec(),
        }
    }

    pub(crate) fn title(&self) -> &str {
        &self.title
    }

    pub(crate) fn add(&mut self, lane: Box<dyn Lane>) {
        self.lanes.push(lane);
    }

    /// Runs all rounds and answers the table.
    pub(crate) async fn measure(&mut self, window: Duration, rounds: u64) -> Result<String> {
        for lane in &mut self.lanes {
            lane.warm_up().await?;
        }
        let mut samples: Vec<Vec<Sample>> = self.lanes.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds as usize {
            // Another one begins each time: whoever comes after a busy lane finds its caches and its dirt.
            for turn in 0..self.lanes.len() {
                let index = (round + turn) % self.lanes.len();
                samples[index].push(self.lanes[index].run(window).await?);
            }
        }
        Ok(self.table(&samples))
    }

    fn table(&self, samples: &[Vec<Sample>]) -> String {
        let bases: Vec<(&str, &[Sample])> = self
            .bases
            .iter()
            .filter_map(|base| {
                let index = self.lanes.iter().position(|lane| lane.name() == *base)?;
                Some((*base, samples[index].as_slice()))
            })
            .collect();
        let width = self.lanes.iter().map(|lane| lane.name().len()).max().unwrap_or(0);
        let mut table = format!("{}\n", self.title);
        let mut head = format!("  {:width$} {:>10}", "", self.unit);
        for (base, _) in &bases {
            _ = write!(head, " {:>12}", format!("of {base}"));
        }
        _ = write!(head, " {:>10} {:>10} {:>10}", "p50", "p99", "own CPU");
        table.push_str(&head);
        for (lane, own) in self.lanes.iter().zip(samples) {
            let rate = median(own.iter().map(|sample| sample.rate));
            _ = write!(table, "\n  {:width$} {:>10}", lane.name(), whole(rate));
            for (_, base) in &bases {
                let ratios = own.iter().zip(*base).map(|(own, base)| own.rate / base.rate);
                _ = write!(table, " {:>12.2}", median(ratios));
            }
            let picks: [fn(&Sample) -> Option<Duration>; 3] = [
                |sample| sample.latency.map(|(half, _)| half),
                |sample| sample.latency.map(|(_, most)| most),
                |sample| sample.cpu,
            ];
            for pick in picks {
                let time = median(own.iter().filter_map(pick).map(|time| time.as_secs_f64()));
                _ = write!(table, " {:>10}", readable(time));
            }
        }
        table
    }
}

/// The middle of what there is; NaN of nothing.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}

/// With a comma between thousands.
fn whole(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Seconds as milliseconds.
pub(crate) fn readable(seconds: f64) -> String {
    if seconds.is_nan() {
        "–".to_owned()
    } else {
        format!("{:.3} ms", seconds * 1000.0)
    }
}
