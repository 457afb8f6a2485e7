//! The planner for Python.

use std::sync::{Mutex, MutexGuard, PoisonError};

use overspill_storm::{self as storm, Action, Coded, Limits, Link, Sample, UnitId};
use pyo3::{exceptions::PyRuntimeError, prelude::*};

use crate::errors::storm_error;

/// Decides for each saved piece of storage; see `overspill_storm::Planner`.
///
/// `allocated_bytes` and `peak_bytes` are what is allocated on the device now and was at most since
/// the call before. An action is 0 to keep, 1 to offload, 2 to rebuild, 3 to compress and offload.
#[pyclass(frozen, module = "overspill._native")]
pub struct Planner {
    planner: Mutex<storm::Planner>,
    clock: std::time::Instant,
}

impl Planner {
    fn lock(&self) -> MutexGuard<'_, storm::Planner> {
        self.planner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self, allocated_bytes: u64, peak_bytes: u64) -> Sample {
        Sample { now_us: self.clock.elapsed().as_secs_f64() * 1e6, allocated_bytes, peak_bytes }
    }
}

fn code(action: Action) -> u8 {
    match action {
        Action::Keep => 0,
        Action::Offload => 1,
        Action::Rebuild | Action::Absent => 2,
        Action::Compress => 3,
    }
}

fn numbers(units: Vec<UnitId>) -> Vec<u64> {
    units.into_iter().map(|unit| unit.0).collect()
}

#[pymethods]
impl Planner {
    /// A planner for `budget_bytes`, of which `fixed_bytes` are taken whatever happens. What it sends away takes at
    /// most `host_bytes` where there is another choice.
    #[new]
    #[pyo3(signature = (*, budget_bytes, fixed_bytes, lookahead_bytes, slack_bytes, host_bytes, offload_gbps, onboard_gbps))]
    fn new(
        budget_bytes: u64,
        fixed_bytes: u64,
        lookahead_bytes: u64,
        slack_bytes: u64,
        host_bytes: u64,
        offload_gbps: f64,
        onboard_gbps: f64,
    ) -> PyResult<Self> {
        let link = Link { offload_gbps, onboard_gbps };
        let limits = Limits { budget_bytes, lookahead_bytes, slack_bytes, host_bytes, link };
        let planner = storm::Planner::new(limits, fixed_bytes).map_err(|error| storm_error(&error))?;
        Ok(Self { planner: Mutex::new(planner), clock: std::time::Instant::now() })
    }

    /// A tensor was saved: `(unit, action)`.
    fn pack(&self, nbytes: u64, allocated_bytes: u64, peak_bytes: u64) -> PyResult<(u64, u8)> {
        // The lock is given up before an exception is made: that may run the collector, and a unit
        // that dies there calls `free`.
        let packed = self.lock().pack(nbytes, self.sample(allocated_bytes, peak_bytes));
        let (unit, action) = packed.map_err(|error| storm_error(&error))?;
        Ok((unit.0, code(action)))
    }

    /// A narrow copy of the unit packed last was made: `(unit, action)`.
    fn pack_narrow(&self, nbytes: u64, allocated_bytes: u64, peak_bytes: u64) -> (u64, u8) {
        let (unit, action) = self.lock().pack_narrow(nbytes, self.sample(allocated_bytes, peak_bytes));
        (unit.0, code(action))
    }

    /// `unit` was proved to be rebuilt from `inputs`, and is from now on.
    #[expect(clippy::needless_pass_by_value, reason = "a list of Python's is extracted into a vector")]
    fn set_recipe(&self, unit: u64, inputs: Vec<u64>) {
        let inputs: Vec<_> = inputs.iter().copied().map(UnitId).collect();
        self.lock().set_recipe(UnitId(unit), &inputs);
    }

    /// The step is not the one that was planned.
    fn deviate(&self) {
        self.lock().deviate();
    }

    /// The source of an offloaded unit was given up.
    fn left(&self, unit: u64) {
        self.lock().left(UnitId(unit));
    }

    /// Backward asks for `unit`.
    fn need(&self, unit: u64, allocated_bytes: u64, peak_bytes: u64) {
        self.lock().need(UnitId(unit), self.sample(allocated_bytes, peak_bytes));
    }

    /// What to do by now, `unit` having been needed if it is given: `(releases, fetches)`.
    #[pyo3(signature = (unit, allocated_bytes))]
    fn due(&self, unit: Option<u64>, allocated_bytes: u64) -> (Vec<u64>, Vec<u64>) {
        let due = self.lock().due(unit.map(UnitId), allocated_bytes);
        (numbers(due.releases), numbers(due.fetches))
    }

    /// A buffer for `unit` was allocated ahead of need.
    fn prefetched(&self, unit: u64) {
        self.lock().prefetched(UnitId(unit));
    }

    /// `unit` is back; compute waited `stalled_us` for it.
    fn arrived(&self, unit: u64, stalled_us: f64) {
        self.lock().arrived(UnitId(unit), stalled_us);
    }

    /// The buffer of a unit that was brought back or rebuilt is gone, the unit is not.
    fn evicted(&self, unit: u64) {
        self.lock().evicted(UnitId(unit));
    }

    /// The last saved tensor of `unit` is gone; `step_peak_bytes` is the most allocated in this step.
    /// True if that was an event.
    #[pyo3(signature = (unit, allocated_bytes, peak_bytes, step_peak_bytes))]
    fn free(&self, unit: u64, allocated_bytes: u64, peak_bytes: u64, step_peak_bytes: Option<u64>) -> bool {
        let sample = self.sample(allocated_bytes, peak_bytes);
        self.lock().free(UnitId(unit), sample, || step_peak_bytes)
    }

    /// Device times of the recorded step that has just ended, one an event, in microseconds; of the
    /// rebuilds in it, `(unit, microseconds)`; of the link codec, `(unit, bytes, microseconds to encode, to
    /// decode)`; and the speed of the link in 1e9 bytes a second.
    #[expect(clippy::needless_pass_by_value, reason = "lists of Python's are extracted into vectors")]
    fn settle(
        &self,
        times_us: Vec<f64>,
        costs_us: Vec<(u64, f64)>,
        coded: Vec<(u64, u64, f64, f64)>,
        offload_gbps: f64,
        onboard_gbps: f64,
    ) {
        let costs_us: Vec<_> = costs_us.iter().map(|&(unit, cost_us)| (UnitId(unit), cost_us)).collect();
        let coded = coded.iter().map(|&(unit, bytes, encode_us, decode_us)| {
            (UnitId(unit), Coded { bytes, encode_us, decode_us })
        });
        let coded: Vec<_> = coded.collect();
        self.lock().settle(&times_us, &costs_us, &coded, Link { offload_gbps, onboard_gbps });
    }

    /// Whether the planner wants to know what is allocated at every event.
    #[getter]
    fn is_recording(&self) -> bool {
        self.lock().is_recording()
    }

    /// Whether device times of events are wanted.
    #[getter]
    fn is_timing(&self) -> bool {
        self.lock().is_timing()
    }

    /// Whether the step looks for recipes.
    #[getter]
    fn is_exploring(&self) -> bool {
        self.lock().is_exploring()
    }

    /// Whether a plan is being followed.
    #[getter]
    fn has_plan(&self) -> bool {
        self.lock().has_plan()
    }

    /// Bytes of units held on the device now.
    #[getter]
    fn held_bytes(&self) -> u64 {
        self.lock().held_bytes()
    }

    /// Most bytes allocated on the device at any time.
    #[getter]
    fn peak_bytes(&self) -> u64 {
        self.lock().peak_bytes()
    }

    /// The plan in force as JSON (`actions`, `schedule`, `predicted`), or None before the second step.
    fn plan_json(&self) -> PyResult<Option<String>> {
        let planner = self.lock();
        let document = planner.plan().map(|(_, plan)| serde_json::to_string(plan)).transpose();
        document.map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }

    /// The recorded step that the plan was made from, as JSON, or None before the second step.
    fn record_json(&self) -> PyResult<Option<String>> {
        let planner = self.lock();
        let document = planner.plan().map(|(record, _)| serde_json::to_string(record)).transpose();
        document.map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }
}
