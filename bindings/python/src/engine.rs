//! The transfer engine for Python.

use std::{path::PathBuf, sync::Arc};

use overspill_device::{
    DeviceRange, DeviceRef, EventRef, Keep, StreamRef, cuda,
    sim::{self, Planted, SimConfig},
};
use overspill_engine::{self as engine, Cause, EngineConfig, SpillConfig};
use pyo3::prelude::*;

use crate::errors::{device_error, engine_error, raise};

/// Moves bytes between a device, host memory and a spill file.
///
/// `device` is "cpu" (device memory is the process's own RAM), "sim" (the same under a schedule
/// drawn from `seed`; tests may have a bug `planted` in it, to see it found), or "cuda" / "cuda:N".
/// Sizes are in bytes.
#[pyclass(frozen, module = "overspill._native")]
pub struct Engine {
    engine: engine::Engine,
    device: DeviceRef,
}

/// Bytes that left the device; given up when this object is.
#[pyclass(frozen, module = "overspill._native")]
pub struct Slot(engine::Slot);

/// What a copy waits for.
#[derive(FromPyObject)]
enum Behind<'py> {
    Stream(u64),
    Mark(Bound<'py, Mark>),
}

/// A point of a stream.
#[pyclass(frozen, module = "overspill._native")]
pub struct Mark(EventRef);

/// A slot on its way back.
#[pyclass(frozen, module = "overspill._native")]
pub struct Onboarding {
    onboarding: engine::Onboarding,
    device: DeviceRef,
}

/// A lease on memory that `owner` keeps alive: `address .. address + bytes`.
pub fn lease(address: u64, bytes: usize, owner: Py<PyAny>) -> DeviceRange {
    let keep: Keep = Arc::new(owner);
    // SAFETY: the Python edge passes the address of a storage together with the storage itself (or
    // a tensor over it), which keeps it allocated and which is held here until the copy has passed.
    // PyO3 defers the decrement when the last lease is dropped on a thread without the GIL.
    unsafe { DeviceRange::from_raw(address, bytes, keep) }
}

fn stream(py: Python<'_>, device: &DeviceRef, handle: u64) -> PyResult<StreamRef> {
    device.wrap_stream(handle).map_err(|error| device_error(py, &error))
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (device, *, host_budget_bytes, slab_bytes, segment_bytes, spill_dir=None, spill_limit_bytes=0, eager_spill=true, seed=None, planted=None, trace=false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python constructor")]
    fn new(
        py: Python<'_>,
        device: &str,
        host_budget_bytes: usize,
        slab_bytes: usize,
        segment_bytes: usize,
        spill_dir: Option<PathBuf>,
        spill_limit_bytes: u64,
        eager_spill: bool,
        seed: Option<u64>,
        planted: Option<&str>,
        trace: bool,
    ) -> PyResult<Self> {
        let device = open(py, device, seed, planted)?;
        let spill =
            spill_dir.map(|dir| SpillConfig { dir, limit_bytes: spill_limit_bytes, eager: eager_spill });
        let config = EngineConfig { host_budget_bytes, slab_bytes, segment_bytes, spill, trace };
        let engine =
            engine::Engine::new(Arc::clone(&device), config).map_err(|error| engine_error(&error))?;
        Ok(Self { engine, device })
    }

    /// The end of what `stream` has been given so far.
    fn mark(&self, py: Python<'_>, stream: u64) -> PyResult<Mark> {
        let stream = self::stream(py, &self.device, stream)?;
        py.detach(|| stream.record()).map(Mark).map_err(|error| device_error(py, &error))
    }

    /// Copies `bytes` at `address` away, behind what `stream` has been given so far, or behind a mark. With None at
    /// once: then whatever wrote them must have passed. `owner` keeps the memory alive and is let go when the copy has
    /// passed or after `release_source`.
    fn offload(
        &self,
        py: Python<'_>,
        address: u64,
        bytes: usize,
        owner: Py<PyAny>,
        stream: Option<Behind<'_>>,
    ) -> PyResult<Slot> {
        let mark = match stream {
            Some(Behind::Stream(stream)) => Some(self.mark(py, stream)?.0),
            Some(Behind::Mark(mark)) => Some(Arc::clone(&mark.get().0)),
            None => None,
        };
        let source = lease(address, bytes, owner);
        let sent = py.detach(|| match &mark {
            Some(mark) => self.engine.offload_behind(&source, mark, Cause::Offload),
            None => self.engine.offload_written(&source, Cause::Offload),
        });
        sent.map(Slot).map_err(|error| engine_error(&error))
    }

    /// Makes `stream` wait for the copy of `slot` (and of all before it) and lets their owners go.
    fn release_source(&self, py: Python<'_>, slot: &Slot, stream: u64) -> PyResult<()> {
        let compute = self::stream(py, &self.device, stream)?;
        py.detach(|| self.engine.release_source(&slot.0, &compute)).map_err(|error| engine_error(&error))
    }

    /// Starts bringing `slot` back to `address`, which `stream` may overwrite from now on.
    #[pyo3(signature = (slot, address, bytes, owner, stream, *, prefetch))]
    #[expect(clippy::too_many_arguments, reason = "a lease is three arguments at this border")]
    fn onboard(
        &self,
        py: Python<'_>,
        slot: &Slot,
        address: u64,
        bytes: usize,
        owner: Py<PyAny>,
        stream: u64,
        prefetch: bool,
    ) -> PyResult<Onboarding> {
        let compute = self::stream(py, &self.device, stream)?;
        let destination = lease(address, bytes, owner);
        let cause = if prefetch { Cause::Prefetch } else { Cause::OnDemand };
        let onboarding = py
            .detach(|| self.engine.onboard(&slot.0, &destination, &compute, cause))
            .map_err(|error| engine_error(&error))?;
        Ok(Onboarding { onboarding, device: Arc::clone(&self.device) })
    }

    /// Takes the whole host budget now.
    fn reserve_host(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.engine.reserve_host()).map_err(|error| engine_error(&error))
    }

    /// Blocks until nothing is under way.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.engine.drain()).map_err(|error| engine_error(&error))
    }

    /// Most bytes that can be away at once, on the host and in the spill file.
    #[getter]
    fn capacity_bytes(&self) -> u64 {
        self.engine.capacity_bytes()
    }

    /// Counters as JSON: `pool`, `disk_bytes`, and per cause `count`, `bytes`, `busy_us`.
    fn counters_json(&self) -> PyResult<String> {
        let stats = self.engine.stats().map_err(|error| engine_error(&error))?;
        let document = serde_json::json!({
            "pool": self.engine.pool_counters(),
            "disk_bytes": self.engine.disk_bytes(),
            "flows": stats,
        });
        Ok(document.to_string())
    }

    /// The timeline of transfers as Perfetto JSON; empty unless made with `trace=True`.
    fn trace_json(&self) -> PyResult<String> {
        Ok(self.engine.trace().map_err(|error| engine_error(&error))?.to_json().to_string())
    }

    /// Name of the device.
    #[getter]
    fn device_name(&self) -> String {
        self.device.info().name.clone()
    }
}

#[pymethods]
impl Slot {
    /// Length in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }
}

#[pymethods]
impl Onboarding {
    /// Makes `stream` wait for the bytes; returns the microseconds for which the host was blocked.
    fn wait(&self, py: Python<'_>, stream: u64) -> PyResult<f64> {
        let compute = self::stream(py, &self.device, stream)?;
        let begin = std::time::Instant::now();
        py.detach(|| self.onboarding.wait_on(&compute)).map_err(|error| engine_error(&error))?;
        Ok(begin.elapsed().as_secs_f64() * 1e6)
    }
}

/// The device called `device`; a seeded one if there is a seed.
pub fn open(py: Python<'_>, device: &str, seed: Option<u64>, planted: Option<&str>) -> PyResult<DeviceRef> {
    let refused = || {
        let what = "expected \"cpu\", \"sim\" with a seed, or \"cuda:N\"";
        raise(py, "DeviceError", &format!("device {device:?} is not known; {what}"), |_| Ok(()))
    };
    let planted = match planted {
        None => Planted::Nothing,
        Some("events_pass_early") => Planted::EventsPassEarly,
        Some("stream_waits_ignored") => Planted::StreamWaitsIgnored,
        Some(_) => return Err(refused()),
    };
    match (device, seed) {
        ("cpu", None) => Ok(sim::SimDevice::threads()),
        ("cpu" | "sim", Some(seed)) => {
            Ok(sim::SimDevice::seeded(SimConfig { seed, planted, ..SimConfig::default() }))
        }
        (_, None) => {
            let rest = device.strip_prefix("cuda").ok_or_else(refused)?;
            let ordinal = match rest.strip_prefix(':') {
                Some(number) => number.parse().map_err(|_| refused())?,
                None if rest.is_empty() => 0,
                None => return Err(refused()),
            };
            let config = cuda::CudaConfig { ordinal, ..cuda::CudaConfig::default() };
            let opened = py.detach(|| cuda::CudaDevice::open(config));
            Ok(opened.map_err(|error| device_error(py, &error))?)
        }
        _ => Err(refused()),
    }
}
