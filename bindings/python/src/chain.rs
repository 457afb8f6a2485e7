//! Chains for Python: states as paths or as tensors in memory; the GIL is released around every operation.

use std::path::PathBuf;

use overspill_chain::{Chain, Error, Keep, Record};
use overspill_tpde::{Checkpoint, Options};
use pyo3::prelude::*;

use crate::errors::chain_error;
use crate::tpde::{Source, reporter};

/// (part, role, state, raw bytes, new bytes)
type PartTuple = (String, &'static str, String, u64, u64);
/// (step, seconds since 1970 when committed, parts)
type RecordTuple = (u64, u64, Vec<PartTuple>);
/// (steps, files removed, bytes removed)
type CollectedTuple = (Vec<u64>, u64, u64);
/// (keyframe, anchor if there is one, patch, state that the patch starts from)
type Route = (PathBuf, Option<PathBuf>, PathBuf, String);

/// A chain of checkpoints in a folder.
#[pyclass(frozen, module = "overspill._native")]
pub struct TpdeChain(Chain);

fn described(record: &Record) -> RecordTuple {
    let parts = record.parts.iter().map(|(name, part)| {
        (name.clone(), part.role.name(), part.state.clone(), part.raw_bytes, part.new_bytes())
    });
    (record.step, record.committed_s, parts.collect())
}

#[pymethods]
impl TpdeChain {
    /// Opens the chain in `folder`; with `create`, makes it where there is none.
    #[new]
    #[pyo3(signature = (folder, *, create, memory_bytes, threads))]
    fn new(
        py: Python<'_>,
        folder: PathBuf,
        create: bool,
        memory_bytes: usize,
        threads: usize,
    ) -> PyResult<Self> {
        let options = Options { memory_bytes, threads };
        py.detach(|| match Chain::open(&folder, options) {
            Err(Error::NotAChain { .. }) if create => Chain::init(&folder, options),
            opened => opened,
        })
        .map(TpdeChain)
        .map_err(|error| chain_error(py, &error))
    }

    /// Commits named parts as `step`.
    #[pyo3(signature = (step, parts, *, progress=None))]
    fn commit(
        &self,
        py: Python<'_>,
        step: u64,
        parts: Vec<(String, Source)>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<RecordTuple> {
        py.detach(|| {
            let opened: Vec<(&str, Checkpoint<'_>)> = parts
                .iter()
                .map(|(name, source)| Ok((name.as_str(), source.open(name)?)))
                .collect::<Result<_, overspill_tpde::Error>>()?;
            let parts: Vec<_> = opened.iter().map(|(name, state)| (*name, state)).collect();
            self.0.commit(step, &parts, &reporter(progress.as_ref()))
        })
        .map(|record| described(&record))
        .map_err(|error| chain_error(py, &error))
    }

    /// Every step, in order.
    fn log(&self, py: Python<'_>) -> PyResult<Vec<RecordTuple>> {
        let log = py.detach(|| self.0.log()).map_err(|error| chain_error(py, &error))?;
        Ok(log.iter().map(described).collect())
    }

    /// Writes a part of a step to `output`.
    #[pyo3(signature = (step, part, output, *, progress=None))]
    fn restore(
        &self,
        py: Python<'_>,
        step: u64,
        part: &str,
        output: PathBuf,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        py.detach(|| self.0.restore(step, part, &output, &reporter(progress.as_ref())))
            .map_err(|error| chain_error(py, &error))
    }

    /// The files that a part of a step is rebuilt from.
    fn route(&self, py: Python<'_>, step: u64, part: &str) -> PyResult<Route> {
        py.detach(|| self.0.route(step, part)).map_err(|error| chain_error(py, &error))
    }

    /// Checks every object and, with `decode`, every step: (steps, objects, bytes).
    #[pyo3(signature = (*, decode, progress=None))]
    fn verify(&self, py: Python<'_>, decode: bool, progress: Option<Py<PyAny>>) -> PyResult<(u64, u64, u64)> {
        py.detach(|| self.0.verify(decode, &reporter(progress.as_ref())))
            .map(|found| (found.steps, found.objects, found.bytes))
            .map_err(|error| chain_error(py, &error))
    }

    /// Drops steps and what no step needs.
    #[pyo3(signature = (*, last, every, after))]
    fn gc(
        &self,
        py: Python<'_>,
        last: Option<u64>,
        every: Option<u64>,
        after: Option<u64>,
    ) -> PyResult<CollectedTuple> {
        py.detach(|| self.0.gc(Keep { last, every, up_to: after }))
            .map(|found| (found.steps, found.files, found.bytes))
            .map_err(|error| chain_error(py, &error))
    }
}
