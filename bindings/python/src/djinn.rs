//! The pool of sessions for Python.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use overspill_device::{DeviceRef, StreamRef};
use overspill_djinn::{Geometry, Pool, PoolConfig, Residency};
use overspill_engine::{HostPool, SpillConfig, SpillFile};
use pyo3::prelude::*;

use crate::{
    engine::{lease, open},
    errors::{device_error, djinn_error, engine_error},
};

/// Keeps the keys and values of many sessions on a device, in host memory and on disk; see the crate
/// `overspill-djinn`. The arena is memory of the caller's, at `address`, kept alive by `owner`.
#[pyclass(frozen, module = "overspill._native")]
pub struct DjinnPool {
    pool: Mutex<Pool>,
    device: DeviceRef,
    geometry: Geometry,
}

impl DjinnPool {
    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stream(&self, py: Python<'_>, handle: u64) -> PyResult<StreamRef> {
        self.device.wrap_stream(handle).map_err(|error| device_error(py, &error))
    }

    /// Calls into the pool without the GIL.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&mut Pool) -> overspill_djinn::Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| call(&mut self.lock())).map_err(|error| djinn_error(py, &error))
    }
}

#[pymethods]
impl DjinnPool {
    #[new]
    #[pyo3(signature = (device, address, arena_bytes, owner, *, layers, tokens, token_bytes, host_budget_bytes, slab_bytes, spill_dir=None, spill_limit_bytes=0, write_through=true, flush_bytes=1048576, lag_tokens=8, tail_tokens=64, seed=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python constructor")]
    fn new(
        py: Python<'_>,
        device: &str,
        address: u64,
        arena_bytes: usize,
        owner: Py<PyAny>,
        layers: usize,
        tokens: usize,
        token_bytes: usize,
        host_budget_bytes: usize,
        slab_bytes: usize,
        spill_dir: Option<PathBuf>,
        spill_limit_bytes: u64,
        write_through: bool,
        flush_bytes: usize,
        lag_tokens: usize,
        tail_tokens: usize,
        seed: Option<u64>,
    ) -> PyResult<Self> {
        let device = open(py, device, seed, None)?;
        let arena = lease(address, arena_bytes, owner);
        let geometry = Geometry { layers, tokens, token_bytes };
        let config = PoolConfig { geometry, write_through, flush_bytes, lag_tokens, tail_tokens };
        let spill = spill_dir.map(|dir| SpillConfig { dir, limit_bytes: spill_limit_bytes, eager: false });
        let shared = Arc::clone(&device);
        let made = py.detach(move || {
            let spill = spill.as_ref().map(SpillFile::create).transpose()?;
            let host = if shared.info().pinned {
                HostPool::growing_ahead(Arc::clone(&shared), host_budget_bytes, slab_bytes)?
            } else {
                HostPool::new(Arc::clone(&shared), host_budget_bytes, slab_bytes)
            };
            Ok((host, spill))
        });
        let (host, spill) = made.map_err(|error| engine_error(&error))?;
        let pool = Pool::new(Arc::clone(&device), arena, host, spill, config);
        let pool = Mutex::new(pool.map_err(|error| djinn_error(py, &error))?);
        Ok(Self { pool, device, geometry })
    }

    /// Bytes of one session's slab.
    #[staticmethod]
    fn slab_bytes(layers: usize, tokens: usize, token_bytes: usize) -> usize {
        Geometry { layers, tokens, token_bytes }.slab_bytes()
    }

    /// Bytes from the start of one part of a layer to the start of the next.
    #[getter]
    fn run_bytes(&self) -> usize {
        self.geometry.run_bytes()
    }

    /// Adds an empty session.
    fn create(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.create(id))
    }

    /// Starts or resumes a forward: the slab, the layer after which it was paused, and whether any
    /// layer has to be touched first.
    fn begin(&self, py: Python<'_>, id: u64) -> PyResult<(usize, Option<usize>, bool)> {
        self.with(py, |pool| pool.begin(id)).map(|begun| (begun.slab, begun.pause, begun.pending))
    }

    /// Makes `stream` wait for what still happens to a layer; call it before the layer is used.
    fn touch(&self, py: Python<'_>, id: u64, layer: usize, stream: u64) -> PyResult<()> {
        let compute = self.stream(py, stream)?;
        self.with(py, |pool| pool.touch(id, layer, &compute))
    }

    /// The layer has `tokens` from this point of `stream` on.
    fn wrote(&self, py: Python<'_>, id: u64, layer: usize, tokens: usize, stream: u64) -> PyResult<()> {
        let compute = self.stream(py, stream)?;
        self.with(py, |pool| pool.wrote(id, layer, tokens, &compute))
    }

    /// As `wrote`, of every layer.
    fn wrote_all(&self, py: Python<'_>, id: u64, tokens: usize, stream: u64) -> PyResult<()> {
        let compute = self.stream(py, stream)?;
        let layers = self.geometry.layers;
        self.with(py, |pool| (0..layers).try_for_each(|layer| pool.wrote(id, layer, tokens, &compute)))
    }

    /// Ends the forward, or stands still after layer `pause`.
    #[pyo3(signature = (id, pause, stream))]
    fn park(&self, py: Python<'_>, id: u64, pause: Option<usize>, stream: u64) -> PyResult<()> {
        let compute = self.stream(py, stream)?;
        self.with(py, |pool| pool.park(id, pause, &compute))
    }

    /// Gives up a forward: the session is what it was when it began.
    fn abandon(&self, py: Python<'_>, id: u64, stream: u64) -> PyResult<()> {
        let compute = self.stream(py, stream)?;
        self.with(py, |pool| pool.abandon(id, &compute))
    }

    /// Sends a session off the device.
    fn evict(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.evict(id))
    }

    /// Starts bringing a session back.
    fn restore(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.restore(id))
    }

    /// Does what is due now, and brings back who is due within `lead_us` more than its way takes; how many came.
    fn tick(&self, py: Python<'_>, lead_us: f64) -> PyResult<usize> {
        self.with(py, |pool| pool.tick(lead_us))
    }

    /// How long until `tick` has something to do.
    fn wake_us(&self) -> Option<u64> {
        self.lock().wake_us()
    }

    /// The session will be needed `eta_us` from now.
    fn expect(&self, py: Python<'_>, id: u64, eta_us: f64) -> PyResult<()> {
        self.with(py, |pool| pool.expect(id, eta_us))
    }

    /// The session has something to compute, and should start `due_us` from now.
    fn ask(&self, py: Python<'_>, id: u64, due_us: u64) -> PyResult<()> {
        self.with(py, |pool| pool.ask(id, due_us))
    }

    /// The sessions that asked and whose turn it is since the last call.
    fn turns(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        self.with(py, Pool::turns)
    }

    /// The session computes no more for now, or asks no more.
    fn end_turn(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.end_turn(id))
    }

    /// Gives up the host copy of a resident session.
    fn drop_host_copy(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.drop_host_copy(id))
    }

    /// Writes the host copy to disk.
    fn spill(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.spill(id))
    }

    /// Reads the host copy back from disk.
    fn unspill(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.unspill(id))
    }

    /// A second session with the same tokens and pause.
    fn fork(&self, py: Python<'_>, parent: u64, child: u64) -> PyResult<()> {
        self.with(py, |pool| pool.fork(parent, child))
    }

    /// Ends a session.
    fn remove(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.with(py, |pool| pool.remove(id))
    }

    /// Writes a session and the caller's record to a file.
    fn save(&self, py: Python<'_>, id: u64, path: PathBuf, record: &str) -> PyResult<()> {
        self.with(py, |pool| pool.save(id, &path, record))
    }

    /// Adds a session from a file; the record that was saved with it.
    fn load(&self, py: Python<'_>, id: u64, path: PathBuf) -> PyResult<String> {
        self.with(py, |pool| pool.load(id, &path))
    }

    /// Tokens of each layer.
    fn tokens(&self, py: Python<'_>, id: u64) -> PyResult<Vec<usize>> {
        self.with(py, |pool| pool.tokens(id))
    }

    /// Whether the session is on the device, and its host copy's bytes in host memory and on disk.
    fn place(&self, py: Python<'_>, id: u64) -> PyResult<(bool, usize, usize)> {
        self.with(py, |pool| {
            let (host, disk) = pool.copy_bytes(id)?;
            Ok((pool.residency(id)? == Residency::Resident, host, disk))
        })
    }

    /// Takes the whole host budget now.
    fn reserve_host(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |pool| pool.reserve_host())
    }

    /// Begins or ends a log of every swap.
    fn log_swaps(&self, open: bool) {
        self.lock().log_swaps(open);
    }

    /// What the log has since it was last asked for, as a JSON list; waits for copies that still run.
    fn swaps_json(&self, py: Python<'_>) -> PyResult<String> {
        Ok(serde_json::json!(self.with(py, Pool::take_swaps)?).to_string())
    }

    /// Blocks until no copy is under way.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, Pool::drain)
    }

    /// Counters as JSON: `slabs`, `slabs_free`, `host`, `disk_bytes` and those of the pool.
    fn counters_json(&self) -> String {
        let pool = self.lock();
        let (slabs, slabs_free) = pool.slabs();
        serde_json::json!({
            "slabs": slabs,
            "slabs_free": slabs_free,
            "host": pool.host_counters(),
            "disk_bytes": pool.disk_bytes(),
            "pool": pool.counters(),
        })
        .to_string()
    }
}
