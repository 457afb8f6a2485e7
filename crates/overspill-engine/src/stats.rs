//! Bytes and time, by direction and cause.

use std::collections::BTreeMap;

use serde::Serialize;

/// Why bytes moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Device to host, as planned.
    Offload,
    /// Host to device, ahead of need.
    Prefetch,
    /// Host to device, when it was needed already.
    OnDemand,
    /// Host to disk.
    Spill,
    /// Disk to host.
    Unspill,
}

impl Cause {
    /// Lower case, as in reports and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Offload => "offload",
            Self::Prefetch => "prefetch",
            Self::OnDemand => "on_demand",
            Self::Spill => "spill",
            Self::Unspill => "unspill",
        }
    }
}

/// What moved for one cause.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Flow {
    /// Transfers.
    pub count: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Time that the link or the disk was busy with it.
    pub busy_us: f64,
}

/// All flows of an engine.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
pub struct Stats(BTreeMap<Cause, Flow>);

impl Stats {
    /// Adds one transfer.
    pub fn add(&mut self, cause: Cause, bytes: usize, busy_us: f64) {
        let flow = self.0.entry(cause).or_default();
        flow.count += 1;
        flow.bytes += bytes as u64;
        flow.busy_us += busy_us;
    }

    /// What moved for `cause`.
    #[must_use]
    pub fn flow(&self, cause: Cause) -> Flow {
        self.0.get(&cause).copied().unwrap_or_default()
    }

    /// Causes with something moved.
    pub fn iter(&self) -> impl Iterator<Item = (Cause, Flow)> + '_ {
        self.0.iter().map(|(cause, flow)| (*cause, *flow))
    }
}
