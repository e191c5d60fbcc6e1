//! What the library counts in this process, of all tests that run in it.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// From the first call on.
pub(crate) struct Measured(&'static PrometheusHandle);

pub(crate) fn measured() -> Measured {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    Measured(RECORDER.get_or_init(|| PrometheusBuilder::new().install_recorder().unwrap()))
}

impl Measured {
    /// A counter without labels; none before it first counts is 0.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        let text = self.0.render();
        let sample = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
        text.lines().find_map(sample).unwrap_or(0)
    }
}
