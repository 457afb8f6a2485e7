//! The planner for Python.

use std::sync::{Mutex, MutexGuard, PoisonError};

use overspill_storm::{self as storm, Action, Limits, Link, Sample, UnitId};
use pyo3::{exceptions::PyRuntimeError, prelude::*};

use crate::errors::storm_error;

/// Decides for each saved piece of storage; see `overspill_storm::Planner`.
#[pyclass(frozen, module = "overspill._native")]
pub struct Planner {
    planner: Mutex<storm::Planner>,
    clock: std::time::Instant,
}

impl Planner {
    fn lock(&self) -> MutexGuard<'_, storm::Planner> {
        self.planner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self, allocated_bytes: u64) -> Sample {
        Sample { now_us: self.clock.elapsed().as_secs_f64() * 1e6, allocated_bytes }
    }
}

#[pymethods]
impl Planner {
    /// A planner for `budget_bytes`, of which `fixed_bytes` are taken whatever happens.
    #[new]
    #[pyo3(signature = (*, budget_bytes, fixed_bytes, lookahead_bytes, offload_gbps, onboard_gbps))]
    fn new(
        budget_bytes: u64,
        fixed_bytes: u64,
        lookahead_bytes: u64,
        offload_gbps: f64,
        onboard_gbps: f64,
    ) -> PyResult<Self> {
        let limits = Limits { budget_bytes, lookahead_bytes, link: Link { offload_gbps, onboard_gbps } };
        let planner = storm::Planner::new(limits, fixed_bytes).map_err(|error| storm_error(&error))?;
        Ok(Self { planner: Mutex::new(planner), clock: std::time::Instant::now() })
    }

    /// A tensor was saved: `(unit, keep)`.
    fn pack(&self, nbytes: u64, allocated_bytes: u64) -> PyResult<(u64, bool)> {
        // The lock is given up before an exception is made: that may run the collector, and a unit
        // that dies there calls `free`.
        let packed = self.lock().pack(nbytes, self.sample(allocated_bytes));
        let (unit, action) = packed.map_err(|error| storm_error(&error))?;
        Ok((unit.0, action == Action::Keep))
    }

    /// The source of an offloaded unit was given up.
    fn left(&self, unit: u64) {
        self.lock().left(UnitId(unit));
    }

    /// Backward asks for `unit`.
    fn need(&self, unit: u64, allocated_bytes: u64) {
        self.lock().need(UnitId(unit), self.sample(allocated_bytes));
    }

    /// Units to bring back now, the soonest needed first.
    fn ahead_of(&self, unit: u64, allocated_bytes: u64) -> Vec<u64> {
        self.lock().ahead_of(UnitId(unit), allocated_bytes).into_iter().map(|unit| unit.0).collect()
    }

    /// A buffer for `unit` was allocated ahead of need.
    fn prefetched(&self, unit: u64) {
        self.lock().prefetched(UnitId(unit));
    }

    /// `unit` is back; compute waited `stalled_us` for it.
    fn arrived(&self, unit: u64, stalled_us: f64) {
        self.lock().arrived(UnitId(unit), stalled_us);
    }

    /// The buffer of a unit that was brought back is gone, the unit is not.
    fn evicted(&self, unit: u64) {
        self.lock().evicted(UnitId(unit));
    }

    /// The last saved tensor of `unit` is gone; `peak_bytes` is the most allocated in this step.
    #[pyo3(signature = (unit, allocated_bytes, peak_bytes))]
    fn free(&self, unit: u64, allocated_bytes: u64, peak_bytes: Option<u64>) {
        self.lock().free(UnitId(unit), self.sample(allocated_bytes), || peak_bytes);
    }

    /// Whether the planner wants to know what is allocated at every event.
    #[getter]
    fn is_recording(&self) -> bool {
        self.lock().is_recording()
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

    /// The plan in force as JSON (`actions`, `predicted`), or None before the first step is over.
    fn plan_json(&self) -> PyResult<Option<String>> {
        let planner = self.lock();
        let document = planner.plan().map(serde_json::to_string).transpose();
        document.map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }
}
