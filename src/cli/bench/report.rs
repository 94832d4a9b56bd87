//! What a scenario measured, as a row of the table or a line of JSON.

use std::time::Duration;

use comfy_table::Table;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::cli::output::{grouped, table};

/// Longest time that is told apart, in microseconds: 100 s.
const LONGEST_US: u64 = 100_000_000;

/// Times, from 1 µs, to three digits.
pub(super) struct Times(Histogram<u64>);

impl Times {
    /// None yet.
    pub(super) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, LONGEST_US, 3).expect("the bounds are constants that fit"))
    }

    /// Adds one.
    pub(super) fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(LONGEST_US));
    }

    /// Adds all of another's.
    pub(super) fn join(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    /// The time in milliseconds that so many percent stay below; zero when there is none.
    fn ms(&self, percent: f64) -> f64 {
        self.0.value_at_percentile(percent) as f64 / 1000.0
    }

    /// The same for people.
    fn shown(&self, percent: f64) -> String {
        if self.0.is_empty() { "-".into() } else { ms(self.ms(percent)) }
    }
}

/// What a scenario measured.
pub(super) struct Report {
    /// Its name.
    pub(super) scenario: &'static str,
    /// What was done, in words.
    pub(super) what: String,
    /// How many.
    pub(super) count: u64,
    /// Of what.
    pub(super) unit: &'static str,
    /// In how long.
    pub(super) took: Duration,
    /// What `times` are the times of.
    pub(super) timed: &'static str,
    /// How long each took.
    pub(super) times: Times,
    /// Whether what was measured is what was meant to happen.
    pub(super) verdict: Result<String, String>,
    /// How it compares with what was measured before and after it.
    pub(super) compared: Option<Compared>,
    /// The router's resident memory afterwards, in bytes.
    pub(super) resident_bytes: Option<u64>,
}

/// A comparison with a yardstick that was measured in the same run. All are this one's over the yardstick's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Compared {
    /// The rates.
    Rate(f64),
    /// The times that 50 and 99 % stay below.
    Times { p50: f64, p99: f64 },
}

impl Compared {
    /// The rate against the mean of the yardsticks' rates.
    pub(super) fn rates(report: &Report, yardsticks: &[Report]) -> Self {
        let limit = yardsticks.iter().map(Report::per_s).sum::<f64>() / yardsticks.len() as f64;
        Self::Rate(report.per_s() / limit)
    }

    /// The times against those of all yardsticks together.
    pub(super) fn times(report: &Report, yardsticks: &[Report]) -> Self {
        let mut all = Times::new();
        yardsticks.iter().for_each(|yardstick| all.join(&yardstick.times));
        let ratio = |percent| report.times.ms(percent) / all.ms(percent).max(0.001);
        Self::Times { p50: ratio(50.0), p99: ratio(99.0) }
    }
}

impl Report {
    /// The rate.
    pub(super) fn per_s(&self) -> f64 {
        self.count as f64 / self.took.as_secs_f64().max(1e-9)
    }

    /// For programs.
    pub(super) fn to_json(&self) -> Value {
        let (rate, p50, p99) = match self.compared {
            None => (None, None, None),
            Some(Compared::Rate(ratio)) => (Some(rounded(ratio, 3)), None, None),
            Some(Compared::Times { p50, p99 }) => (None, Some(rounded(p50, 3)), Some(rounded(p99, 3))),
        };
        json!({
            "scenario": self.scenario,
            "what": self.what,
            "count": self.count,
            "unit": self.unit,
            "seconds": rounded(self.took.as_secs_f64(), 3),
            "per_s": rounded(self.per_s(), 1),
            "timed": self.timed,
            "p50_ms": self.times.ms(50.0),
            "p90_ms": self.times.ms(90.0),
            "p99_ms": self.times.ms(99.0),
            "p999_ms": self.times.ms(99.9),
            "max_ms": self.times.ms(100.0),
            "verified": self.verdict.is_ok(),
            "verdict": match &self.verdict { Ok(text) | Err(text) => text },
            "ratio_to_baseline": rate,
            "p50_ratio_to_baseline": p50,
            "p99_ratio_to_baseline": p99,
            "router_resident_bytes": self.resident_bytes,
        })
    }
}

/// For people.
pub(super) fn to_table(reports: &[Report]) -> Table {
    let mut rows = table(["scenario", "rate", "count", "seconds", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "of"]);
    for report in reports {
        rows.add_row([
            report.scenario.to_owned(),
            format!("{} {}/s", grouped(report.per_s().round() as u64), report.unit),
            grouped(report.count),
            format!("{:.2}", report.took.as_secs_f64()),
            report.times.shown(50.0),
            report.times.shown(99.0),
            report.times.shown(99.9),
            report.times.shown(100.0),
            report.timed.to_owned(),
        ]);
    }
    rows
}

/// What the table has no room for.
pub(super) fn remarks(report: &Report) -> Vec<String> {
    let mut remarks = vec![format!("{}: {}", report.scenario, report.what)];
    remarks.push(match &report.verdict {
        Ok(text) => format!("  verified: {text}"),
        Err(text) => format!("  NOT AS IT SHOULD BE: {text}"),
    });
    match report.compared {
        Some(Compared::Rate(ratio)) => remarks.push(format!("  {ratio:.3} of the baseline in the same run")),
        Some(Compared::Times { p50, p99 }) => {
            remarks.push(format!("  p50 {p50:.2} times and p99 {p99:.2} times the baseline's in the same run"));
        }
        None => {}
    }
    if let Some(bytes) = report.resident_bytes {
        remarks.push(format!("  the router's resident memory afterwards: {} MiB", bytes >> 20));
    }
    remarks
}

fn ms(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.0}") }
}

fn rounded(number: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (number * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_how_many_in_how_long() {
        let mut times = Times::new();
        (1..=1000).for_each(|ms| times.add(Duration::from_millis(ms)));
        let report = Report {
            scenario: "send",
            what: "x".into(),
            count: 50_000,
            unit: "messages",
            took: Duration::from_secs(2),
            timed: "request",
            times,
            verdict: Ok("all".into()),
            compared: Some(Compared::Rate(0.5)),
            resident_bytes: None,
        };
        let json = report.to_json();
        assert_eq!(
            (&json["per_s"], &json["verified"], &json["ratio_to_baseline"]),
            (&json!(25_000.0), &json!(true), &json!(0.5))
        );
        assert!((json["p50_ms"].as_f64().expect("a number") - 500.0).abs() < 1.0, "{json}");
        let text = to_table(&[report]).to_string();
        assert!(text.contains("25,000 messages/s") && text.contains("50,000"), "{text}");
    }
}
