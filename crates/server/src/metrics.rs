//! What the service counts and measures: every metric with its help, its buckets and the series that are there before
//! anything has happened, and all of it as text for Prometheus.
//!
//! Labels are bounded: the names of locks, tenants and users are never among them, nor raw paths.

mod requests;
mod sample;

use std::sync::OnceLock;
use std::time::Duration;

use axum::http::header;
use axum::response::IntoResponse;
use metrics::{Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

pub(crate) use self::requests::count;
pub(crate) use self::sample::Sampler;

/// How often what was measured is put into its buckets, where nobody asks for it.
const UPKEEP: Duration = Duration::from_secs(5);

/// From 100 µs to a minute: waits.
const WAITS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0,
];
/// From a millisecond to a day: what holds a lock, or is worked on.
const HOLDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0,
];

/// Something that is counted or measured.
struct Metric {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    series: Series,
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge(Unit),
    /// A histogram of seconds, with these buckets.
    Seconds(&'static [f64]),
}

/// Which series are there from the start, so that the first of something is an increase for an alert.
#[derive(Clone, Copy)]
enum Series {
    /// The one without labels.
    One,
    /// One for each backend of locks.
    Backends,
    /// One for each way in which an attempt of each backend may end.
    Attempts,
    /// One for each of these values of a label.
    Each(&'static str, &'static [&'static str]),
    /// None: the values of its labels are known when they come.
    AsTheyCome,
}

const BACKENDS: [&str; 3] = ["lease", "session", "transaction"];
const ATTEMPTS: [&str; 6] = [
    "acquired",
    "contended",
    "timed_out",
    "unavailable",
    "unknown",
    "invalid",
];

/// Every metric there is.
const METRICS: &[Metric] = &[
    Metric {
        name: "leasehold_lock_acquire_total",
        kind: Kind::Counter,
        help: "Attempts to acquire a lock, by how they ended",
        series: Series::Attempts,
    },
    Metric {
        name: "leasehold_lock_wait_seconds",
        kind: Kind::Seconds(WAITS),
        help: "How long attempts to acquire a lock took, however they ended",
        series: Series::Backends,
    },
    Metric {
        name: "leasehold_lock_hold_seconds",
        kind: Kind::Seconds(HOLDS),
        help: "How long locks were held",
        series: Series::Backends,
    },
    Metric {
        name: "leasehold_lock_held",
        kind: Kind::Gauge(Unit::Count),
        help: "Locks that this process holds; those handed to clients of the API are theirs",
        series: Series::Backends,
    },
    Metric {
        name: "leasehold_lock_waiting",
        kind: Kind::Gauge(Unit::Count),
        help: "Attempts to acquire a lock that are under way",
        series: Series::Backends,
    },
    Metric {
        name: "leasehold_lock_lost_total",
        kind: Kind::Counter,
        help: "Locks that ended before their holder released them",
        series: Series::Backends,
    },
    Metric {
        name: "leasehold_unlock_false_total",
        kind: Kind::Counter,
        help: "Unlocks of session locks that the server did not know of: somebody else uses the session",
        series: Series::One,
    },
    Metric {
        name: "leasehold_tainted_connections_closed_total",
        kind: Kind::Counter,
        help: "Connections that were closed because their work was dropped before it had ended",
        series: Series::One,
    },
    Metric {
        name: "leasehold_outcome_unknown_total",
        kind: Kind::Counter,
        help: "Statements and commits whose answer was lost, so that nobody knows whether they had their effect",
        series: Series::One,
    },
    Metric {
        name: "leasehold_fence_refused_total",
        kind: Kind::Counter,
        help: "Fenced transactions that were rolled back because their lock was lost",
        series: Series::One,
    },
    Metric {
        name: "leasehold_heartbeat_late_seconds",
        kind: Kind::Seconds(WAITS),
        help: "How much later than planned the renewal of leases began",
        series: Series::One,
    },
    Metric {
        name: "leasehold_pool_wait_seconds",
        kind: Kind::Seconds(WAITS),
        help: "How long it took to be given a connection, or none",
        series: Series::One,
    },
    Metric {
        name: "leasehold_pool_timeouts_total",
        kind: Kind::Counter,
        help: "How often no connection of the pool became free in time",
        series: Series::One,
    },
    Metric {
        name: "leasehold_pool_connections",
        kind: Kind::Gauge(Unit::Count),
        help: "Open connections of the pool, idle and used",
        series: Series::Each("state", &["idle", "used"]),
    },
    Metric {
        name: "leasehold_database_up",
        kind: Kind::Gauge(Unit::Count),
        help: "1 when the database has answered the last question for these metrics; else the numbers of the queue are \
               old",
        series: Series::One,
    },
    Metric {
        name: "leasehold_tenant_gate_refused_total",
        kind: Kind::Counter,
        help: "Writes that were refused because their tenant is being drained",
        series: Series::One,
    },
    Metric {
        name: "leasehold_tenant_drain_wait_seconds",
        kind: Kind::Seconds(HOLDS),
        help: "How long drains of tenants waited for writers",
        series: Series::One,
    },
    Metric {
        name: "leasehold_queue_claimed_total",
        kind: Kind::Counter,
        help: "Work items that workers of this process claimed",
        series: Series::One,
    },
    Metric {
        name: "leasehold_queue_settled_total",
        kind: Kind::Counter,
        help: "Work items that workers of this process were done with, by what became of them",
        series: Series::Each(
            "outcome",
            &["completed", "retried", "failed", "put_back", "not_owned"],
        ),
    },
    Metric {
        name: "leasehold_queue_lost_total",
        kind: Kind::Counter,
        help: "Claims of work items that ended while they were worked on",
        series: Series::One,
    },
    Metric {
        name: "leasehold_queue_processing_seconds",
        kind: Kind::Seconds(HOLDS),
        help: "How long work items were worked on, by kind",
        series: Series::AsTheyCome,
    },
    Metric {
        name: "leasehold_queue_items",
        kind: Kind::Gauge(Unit::Count),
        help: "Work items of all processes, by kind and state; dead ones are dead letters",
        series: Series::AsTheyCome,
    },
    Metric {
        name: "leasehold_queue_oldest_ready_seconds",
        kind: Kind::Gauge(Unit::Seconds),
        help: "How old the oldest event is that could be worked on now, by kind",
        series: Series::AsTheyCome,
    },
    Metric {
        name: "leasehold_job_runs_total",
        kind: Kind::Counter,
        help: "Runs of jobs in this process, by job and outcome",
        series: Series::AsTheyCome,
    },
    Metric {
        name: "leasehold_job_run_seconds",
        kind: Kind::Seconds(HOLDS),
        help: "How long runs of jobs took",
        series: Series::AsTheyCome,
    },
    Metric {
        name: "leasehold_http_requests_total",
        kind: Kind::Counter,
        help: "Requests, by the template of their route, method and status; hung_up when the client did not wait",
        series: Series::AsTheyCome,
    },
    Metric {
        name: "leasehold_http_request_seconds",
        kind: Kind::Seconds(WAITS),
        help: "How long requests took, waits for locks included",
        series: Series::AsTheyCome,
    },
];

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

impl Metric {
    fn describe(&self, recorder: &impl Recorder) {
        let (name, help) = (self.name.into(), self.help.into());
        match self.kind {
            Kind::Counter => recorder.describe_counter(name, Some(Unit::Count), help),
            Kind::Gauge(unit) => recorder.describe_gauge(name, Some(unit), help),
            Kind::Seconds(_) => recorder.describe_histogram(name, Some(Unit::Seconds), help),
        }
        for labels in self.series.labels() {
            let key = Key::from_parts(self.name, labels);
            match self.kind {
                Kind::Counter => drop(recorder.register_counter(&key, &METADATA)),
                Kind::Gauge(_) => drop(recorder.register_gauge(&key, &METADATA)),
                Kind::Seconds(_) => drop(recorder.register_histogram(&key, &METADATA)),
            }
        }
    }
}

impl Series {
    fn labels(self) -> Vec<Vec<Label>> {
        let each = |name, values: &'static [&'static str]| -> Vec<Vec<Label>> {
            let one = |value| vec![Label::from_static_parts(name, value)];
            values.iter().copied().map(one).collect()
        };
        match self {
            Self::One => vec![Vec::new()],
            Self::Backends => each("backend", &BACKENDS),
            Self::Attempts => each("backend", &BACKENDS)
                .into_iter()
                .flat_map(|backend| {
                    each("outcome", &ATTEMPTS)
                        .into_iter()
                        .map(move |outcome| [backend.clone(), outcome].concat())
                })
                .collect(),
            Self::Each(name, values) => each(name, values),
            Self::AsTheyCome => Vec::new(),
        }
    }
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    METRICS
        .iter()
        .try_fold(PrometheusBuilder::new(), |builder, metric| {
            let name = || Matcher::Full(metric.name.to_owned());
            match metric.kind {
                Kind::Seconds(buckets) => builder.set_buckets_for_metric(name(), buckets),
                Kind::Counter | Kind::Gauge(_) => Ok(builder),
            }
        })
}

/// Counts and measures from now on. Once a process; later calls answer the same. Where a program that this is a part of
/// has a recorder of its own, that one gets it all.
pub(crate) fn start() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let builder = builder().unwrap_or_else(|error| {
            tracing::error!(%error, "histograms have no buckets");
            PrometheusBuilder::new()
        });
        let recorder = builder.build_recorder();
        for metric in METRICS {
            metric.describe(&recorder);
        }
        let handle = recorder.handle();
        if let Err(error) = metrics::set_global_recorder(recorder) {
            tracing::debug!(%error, "what is counted goes where it went before");
        }
        handle
    })
}

/// Keeps what was measured from piling up while nobody asks for it.
pub(crate) async fn keep_up() {
    let handle = start();
    let mut period = tokio::time::interval(UPKEEP);
    loop {
        period.tick().await;
        handle.run_upkeep();
    }
}

/// All of it, in the text format of Prometheus.
pub(crate) fn render() -> impl IntoResponse {
    let format = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, format)], start().render())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn project() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    fn described() -> BTreeSet<&'static str> {
        METRICS.iter().map(|metric| metric.name).collect()
    }

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    /// The names that come after `before`, up to what cannot be part of one.
    fn names<'a>(text: &'a str, before: &str) -> Vec<&'a str> {
        let part = |letter: char| letter.is_ascii_lowercase() || letter == '_';
        text.match_indices(before)
            .map(|(at, _)| text[at + before.len()..].trim_start_matches(['(', '"', '\n', ' ']))
            .map(|rest| &rest[..rest.find(|letter| !part(letter)).unwrap_or(rest.len())])
            .collect()
    }

    #[test]
    fn what_the_code_counts_is_described_and_the_other_way_round() {
        let mut files = Vec::new();
        for part in ["server", "storage", "http"] {
            sources(&project().join("crates").join(part).join("src"), &mut files);
        }
        let mut counted = BTreeSet::new();
        for file in files
            .iter()
            .filter(|file| !file.ends_with("server/src/metrics.rs"))
        {
            let text = fs::read_to_string(file).unwrap();
            for call in ["counter!", "gauge!", "histogram!"] {
                counted.extend(names(&text, call).into_iter().map(str::to_owned));
            }
        }
        let described: BTreeSet<String> = described().into_iter().map(str::to_owned).collect();
        assert_eq!(counted, described);
    }

    #[test]
    fn alerts_and_dashboard_name_only_what_there_is() {
        for file in ["alerts.yml", "dashboard.json"] {
            let text = fs::read_to_string(project().join("docs/monitoring").join(file)).unwrap();
            let named: Vec<String> = names(&text, "leasehold_")
                .into_iter()
                .map(|rest| format!("leasehold_{rest}"))
                .collect();
            assert!(!named.is_empty(), "{file}");
            for name in named {
                let of_histogram = ["_bucket", "_sum", "_count"]
                    .into_iter()
                    .find_map(|suffix| name.strip_suffix(suffix));
                let there = METRICS.iter().any(|metric| match metric.kind {
                    Kind::Seconds(_) => of_histogram == Some(metric.name),
                    Kind::Counter | Kind::Gauge(_) => name == metric.name,
                });
                assert!(there, "{file} names {name}");
            }
        }
    }

    #[test]
    fn the_dashboard_is_json_and_the_page_has_the_rules_of_the_file() {
        let docs = project().join("docs");
        let dashboard = fs::read_to_string(docs.join("monitoring/dashboard.json")).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
        assert!(!dashboard["panels"].as_array().unwrap().is_empty());
        let rules = fs::read_to_string(docs.join("monitoring/alerts.yml")).unwrap();
        let page = fs::read_to_string(docs.join("operating.md")).unwrap();
        assert!(
            page.contains(&format!("```yaml\n{rules}```")),
            "copy the file into the page"
        );
        for alert in rules
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- alert: "))
        {
            assert!(
                page.contains(&format!("### {alert}\n")),
                "what to do about {alert}?"
            );
        }
    }

    #[test]
    fn series_are_there_before_anything_has_happened() {
        let recorder = builder().unwrap().build_recorder();
        for metric in METRICS {
            metric.describe(&recorder);
        }
        let text = recorder.handle().render();
        for line in [
            r#"leasehold_lock_acquire_total{backend="session",outcome="timed_out"} 0"#,
            r#"leasehold_lock_wait_seconds_bucket{backend="lease",le="0.0001"} 0"#,
            r#"leasehold_lock_hold_seconds_bucket{backend="lease",le="86400"} 0"#,
            r#"leasehold_queue_settled_total{outcome="failed"} 0"#,
            "leasehold_fence_refused_total 0",
            "# TYPE leasehold_heartbeat_late_seconds histogram",
        ] {
            assert!(text.lines().any(|there| there == line), "{line}\n{text}");
        }
    }
}
