//! TPDE for Python: checkpoints as paths or as tensors in memory, patches as paths or bytes.
//!
//! A tensor in memory comes as (name, dtype, shape, address, bytes); the Python edge (`overspill.tpde`) holds
//! the object behind each address for the length of the call, contiguous, little endian, and for outputs not
//! shared with anything else in the call. The GIL is released around every operation.

use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::str::FromStr;

use overspill_tpde::checkpoint::MemoryTensor;
use overspill_tpde::{
    BaseKind, Checkpoint, CodecChoice, Error, Kind, Options, PackOptions, PackReport, Patch, StateId, apply,
    apply_in_place, apply_into, authenticate, decode_tensor, dequantize, inspect, pack, pack_to_pieces,
    quantize, state_id, verify,
};
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::errors::tpde_error;

/// (name, safetensors dtype, shape, address, bytes)
pub type RawTensor = (String, String, Vec<u64>, usize, usize);
/// (kind, base id, final id, raw bytes, packed bytes, the patch if it went to memory)
type PackedTuple = (String, Option<String>, String, u64, u64, Option<Py<PyBytes>>);
/// (name, safetensors dtype, shape, bytes)
type Described = (String, String, Vec<u64>, u64);

/// A checkpoint: its path, or its tensors.
#[derive(FromPyObject)]
pub enum Source {
    /// A file, folder or index.
    Path(PathBuf),
    /// Tensors in memory.
    Memory(Vec<RawTensor>),
}

/// A patch: its path, or its bytes.
#[derive(FromPyObject)]
pub enum PatchSource {
    /// A file.
    Path(PathBuf),
    /// The whole patch.
    Bytes(PyBackedBytes),
    /// The same at (address, bytes), which stays there for as long as the object lives.
    Memory((usize, usize, Py<PyAny>)),
}

/// Memory of a Python object.
struct Held {
    address: usize,
    bytes: usize,
    _owner: Py<PyAny>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        bytes_at(self.address, self.bytes)
    }
}

impl Source {
    /// Opens it; tensors in memory stand in errors as `label`.
    pub fn open(&self, label: &str) -> Result<Checkpoint<'_>, Error> {
        let tensors = match self {
            Source::Path(path) => return Checkpoint::open(path),
            Source::Memory(tensors) => tensors,
        };
        let described = tensors.iter().map(|(name, dtype, shape, address, bytes)| {
            let kind = Kind::from_name(dtype)
                .ok_or_else(|| Error::Misuse { what: format!("{name:?}: no such dtype as {dtype:?}") })?;
            let bytes = bytes_at(*address, *bytes);
            Ok(MemoryTensor { name: name.clone(), kind, shape: shape.clone(), bytes })
        });
        Checkpoint::from_memory(label, described.collect::<Result<_, Error>>()?)
    }
}

/// The bytes at `address` of this process.
pub fn bytes_at<'a>(address: usize, bytes: usize) -> &'a [u8] {
    if bytes == 0 {
        return &[];
    }
    // SAFETY: the Python edge passes the address and the size in bytes of a contiguous CPU tensor that it holds
    // until the call returns; the slice does not outlive the call.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), bytes) }
}

/// The bytes at `address` of this process, which nothing else refers to.
pub fn out_at<'a>(address: usize, bytes: usize) -> &'a mut [u8] {
    if bytes == 0 {
        return &mut [];
    }
    // SAFETY: as in `bytes_at`; the edge has just allocated the tensor for this call, so nothing else refers to it.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), bytes) }
}

/// Calls a Python function with (bytes done, bytes in all); an exception in it is reported and passed over.
pub fn reporter(progress: Option<&Py<PyAny>>) -> impl Fn(u64, u64) + Sync + '_ {
    move |done, total| {
        if let Some(progress) = progress {
            Python::attach(|py| {
                if let Err(error) = progress.call1(py, (done, total)) {
                    error.write_unraisable(py, None);
                }
            });
        }
    }
}

/// Pieces as one `bytes`, which asks for huge pages: the first touch of plain ones is slower than the copy.
fn joined(py: Python<'_>, pieces: &[Vec<u8>]) -> PyResult<Py<PyBytes>> {
    let bytes: usize = pieces.iter().map(Vec::len).sum();
    // SAFETY: without a source Python allocates `bytes` bytes for this call to fill; null is an exception.
    let made = unsafe {
        let size = bytes.try_into().map_err(|_| PyMemoryError::new_err("the patch"))?;
        Bound::from_owned_ptr_or_err(py, ffi::PyBytes_FromStringAndSize(std::ptr::null(), size))?
    };
    // SAFETY: the object is `bytes` and new, so nothing else reads or writes it; it holds `bytes` bytes.
    let room: &mut [MaybeUninit<u8>] =
        unsafe { std::slice::from_raw_parts_mut(ffi::PyBytes_AsString(made.as_ptr()).cast(), bytes) };
    ask_for_huge_pages(room);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share_bytes = bytes.div_ceil(cores).max(1).next_multiple_of(HUGE_BYTES);
    std::thread::scope(|scope| {
        let mut shares = room.chunks_mut(share_bytes).enumerate();
        let own = shares.next();
        for (i, share) in shares {
            scope.spawn(move || copy_from(pieces, i * share_bytes, share));
        }
        if let Some((_, share)) = own {
            copy_from(pieces, 0, share);
        }
    });
    Ok(made.cast_into::<PyBytes>()?.unbind())
}

/// Fills `room` with what lies `start_bytes` into the pieces, which reach beyond it.
fn copy_from(pieces: &[Vec<u8>], mut start_bytes: usize, mut room: &mut [MaybeUninit<u8>]) {
    for piece in pieces {
        let rest = &piece[start_bytes.min(piece.len())..];
        start_bytes -= piece.len() - rest.len();
        let (own, others) = room.split_at_mut(rest.len().min(room.len()));
        own.write_copy_of_slice(&rest[..own.len()]);
        room = others;
    }
}

const HUGE_BYTES: usize = 2 << 20;

/// Advice only: a system without huge pages goes on with plain ones.
fn ask_for_huge_pages(memory: &mut [MaybeUninit<u8>]) {
    let skipped = memory.as_ptr().align_offset(HUGE_BYTES).min(memory.len());
    let whole = (memory.len() - skipped) / HUGE_BYTES * HUGE_BYTES;
    let inside = &mut memory[skipped..skipped + whole];
    if !inside.is_empty() {
        // SAFETY: whole pages inside memory that is ours; the advice changes no content.
        let _ = unsafe {
            rustix::mm::madvise(inside.as_mut_ptr().cast(), inside.len(), rustix::mm::Advice::LinuxHugepage)
        };
    }
}

fn packed(report: PackReport, data: Option<Py<PyBytes>>) -> PackedTuple {
    (
        report.kind.name().to_owned(),
        report.kind.base().map(|id| id.to_string()),
        report.final_id.to_string(),
        report.raw_bytes,
        report.packed_bytes,
        data,
    )
}

/// Packs `final_state` against `base` into the file `output`, or into memory.
#[pyfunction]
#[pyo3(signature = (base, final_state, output, *, absolute, codec, memory_bytes, threads, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub fn tpde_pack(
    py: Python<'_>,
    base: Option<Source>,
    final_state: Source,
    output: Option<PathBuf>,
    absolute: bool,
    codec: &str,
    memory_bytes: usize,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<PackedTuple> {
    let codec = match codec {
        "auto" => CodecChoice::Auto,
        "elias-zstd" => CodecChoice::EliasZstd,
        "gpu" => CodecChoice::Gpu,
        other => return Err(PyValueError::new_err(format!("no such codec as {other:?}"))),
    };
    let options = PackOptions { absolute, codec, run: Options { memory_bytes, threads } };
    let done = py.detach(|| {
        let base = base.as_ref().map(|base| base.open("base")).transpose()?;
        let final_state = final_state.open("final")?;
        let report = reporter(progress.as_ref());
        match &output {
            Some(path) => Ok((pack(base.as_ref(), &final_state, path, &options, &report)?, None)),
            None => pack_to_pieces(base.as_ref(), &final_state, &options, &report)
                .map(|(r, pieces)| (r, Some(pieces))),
        }
    });
    let (report, pieces) = done.map_err(|error| tpde_error(py, &error))?;
    let data = pieces.map(|pieces| joined(py, &pieces)).transpose()?;
    Ok(packed(report, data))
}

/// A state id from its text.
pub fn state_of(text: Option<&str>) -> PyResult<Option<StateId>> {
    text.map(StateId::from_str).transpose().map_err(PyValueError::new_err)
}

/// The state id of a checkpoint.
#[pyfunction]
#[pyo3(signature = (source, *, memory_bytes, threads))]
pub fn tpde_state_id(
    py: Python<'_>,
    source: Source,
    memory_bytes: usize,
    threads: usize,
) -> PyResult<String> {
    let options = Options { memory_bytes, threads };
    py.detach(|| state_id(&source.open("checkpoint")?, &options, &|_, _| ()))
        .map(|id| id.to_string())
        .map_err(|error| tpde_error(py, &error))
}

/// Quantizes weights of `dtype` at (address, bytes) to blocks of `layout`, or with `back` the other way round.
#[pyfunction]
#[pyo3(signature = (layout, dtype, source, *, back, memory_bytes, threads))]
pub fn tpde_quantize(
    py: Python<'_>,
    layout: &str,
    dtype: &str,
    source: (usize, usize),
    back: bool,
    memory_bytes: usize,
    threads: usize,
) -> PyResult<Py<PyBytes>> {
    let (Some(Kind::Quantized(layout)), Some(Kind::Plain(dtype))) =
        (Kind::from_name(layout), Kind::from_name(dtype))
    else {
        return Err(PyValueError::new_err(format!("no such layout or dtype as {layout:?}, {dtype:?}")));
    };
    let options = Options { memory_bytes, threads };
    let made = py.detach(|| match back {
        false => quantize(layout, bytes_at(source.0, source.1), dtype, &options),
        true => dequantize(layout, bytes_at(source.0, source.1), dtype, &options),
    });
    made.map(|made| PyBytes::new(py, &made).unbind()).map_err(|error| tpde_error(py, &error))
}

/// An opened patch.
#[pyclass(frozen, module = "overspill._native")]
pub struct TpdePatch(pub Patch<'static>);

#[pymethods]
impl TpdePatch {
    #[new]
    fn new(py: Python<'_>, source: PatchSource) -> PyResult<Self> {
        py.detach(|| match source {
            PatchSource::Path(path) => Patch::open(&path),
            PatchSource::Bytes(bytes) => Patch::from_owner("patch", Box::new(bytes)),
            PatchSource::Memory((address, bytes, owner)) => {
                Patch::from_owner("patch", Box::new(Held { address, bytes, _owner: owner }))
            }
        })
        .map(TpdePatch)
        .map_err(|error| tpde_error(py, &error))
    }

    /// "standalone", "relative" or "absolute".
    #[getter]
    fn kind(&self) -> &'static str {
        self.0.kind().name()
    }

    /// State that it starts from.
    #[getter]
    fn base_id(&self) -> Option<String> {
        self.0.kind().base().map(|id| id.to_string())
    }

    /// State that it makes.
    #[getter]
    fn final_id(&self) -> String {
        self.0.final_id().to_string()
    }

    /// Size of the patch.
    #[getter]
    fn packed_bytes(&self) -> u64 {
        self.0.file_bytes()
    }

    /// (name, dtype, shape, bytes) of every tensor that it makes.
    fn tensors(&self) -> Vec<Described> {
        let entries = self.0.manifest().entries().iter().map(|entry| &entry.tensor);
        entries.map(|t| (t.name.clone(), t.kind.name().to_owned(), t.shape.clone(), t.bytes)).collect()
    }

    /// What each of `tensors()` starts from: "none", "words", or the layout of quantized blocks.
    fn bases(&self) -> Vec<&'static str> {
        let of = |base| match base {
            BaseKind::None => "none",
            BaseKind::Words => "words",
            BaseKind::Quantized(layout) => Kind::Quantized(layout).name(),
        };
        self.0.manifest().entries().iter().map(|entry| of(entry.base)).collect()
    }

    /// Compares every byte of it with its hash.
    fn authenticate(&self, py: Python<'_>, memory_bytes: usize, threads: usize) -> PyResult<()> {
        let options = Options { memory_bytes, threads };
        py.detach(|| authenticate(&self.0, &options)).map_err(|error| tpde_error(py, &error))
    }

    /// Decodes number `entry` of `tensors()` from `base` into `out`, both (address, bytes); it must have been
    /// authenticated.
    fn decode_tensor(
        &self,
        py: Python<'_>,
        entry: usize,
        base: (usize, usize),
        out: (usize, usize),
        memory_bytes: usize,
        threads: usize,
    ) -> PyResult<()> {
        let options = Options { memory_bytes, threads };
        py.detach(|| decode_tensor(&self.0, entry, bytes_at(base.0, base.1), out_at(out.0, out.1), &options))
            .map_err(|error| tpde_error(py, &error))
    }

    /// Copies payloads from byte `start` of their section on to `out`, (address, bytes).
    fn read_payloads(&self, py: Python<'_>, start: u64, out: (usize, usize)) -> PyResult<()> {
        py.detach(|| self.0.read_blob(start, out_at(out.0, out.1))).map_err(|error| tpde_error(py, &error))
    }

    /// Bytes of all payloads.
    #[getter]
    fn payload_bytes(&self) -> u64 {
        self.0.blob_bytes()
    }

    /// The report of `overspill tpde inspect --json`.
    fn inspect(&self, py: Python<'_>, memory_bytes: usize, threads: usize) -> PyResult<String> {
        let options = Options { memory_bytes, threads };
        py.detach(|| inspect(&self.0, &options).map(|found| found.to_json(&self.0).to_string()))
            .map_err(|error| tpde_error(py, &error))
    }

    /// Checks every byte and, where the base is given or none is needed, the result; says whether it decoded.
    #[pyo3(signature = (base, *, memory_bytes, threads, progress=None))]
    fn verify(
        &self,
        py: Python<'_>,
        base: Option<Source>,
        memory_bytes: usize,
        threads: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<bool> {
        let options = Options { memory_bytes, threads };
        py.detach(|| {
            let base = base.as_ref().map(|base| base.open("base")).transpose()?;
            verify(&self.0, base.as_ref(), &options, &reporter(progress.as_ref())).map(|found| found.decoded)
        })
        .map_err(|error| tpde_error(py, &error))
    }

    /// Writes the state that it makes to `output`; returns its state id.
    #[pyo3(signature = (base, output, *, memory_bytes, threads, progress=None))]
    fn apply(
        &self,
        py: Python<'_>,
        base: Option<Source>,
        output: PathBuf,
        memory_bytes: usize,
        threads: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<String> {
        let options = Options { memory_bytes, threads };
        py.detach(|| {
            let base = base.as_ref().map(|base| base.open("base")).transpose()?;
            apply(&self.0, base.as_ref(), &output, &options, &reporter(progress.as_ref()))
        })
        .map(|id| id.to_string())
        .map_err(|error| tpde_error(py, &error))
    }

    /// Decodes into buffers, (address, bytes) of each tensor in the order of `tensors()`; returns the state id.
    ///
    /// With `base_id` the base is taken to be that state and is not hashed.
    #[pyo3(signature = (base, outs, *, base_id, memory_bytes, threads, progress=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
    fn apply_into(
        &self,
        py: Python<'_>,
        base: Option<Source>,
        outs: Vec<(usize, usize)>,
        base_id: Option<&str>,
        memory_bytes: usize,
        threads: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<String> {
        let options = Options { memory_bytes, threads };
        let known = state_of(base_id)?;
        py.detach(|| {
            let base = base.as_ref().map(|base| base.open("base")).transpose()?;
            let outs = outs.iter().map(|&(address, bytes)| out_at(address, bytes)).collect();
            apply_into(&self.0, base.as_ref(), known, outs, &options, &reporter(progress.as_ref()))
        })
        .map(|id| id.to_string())
        .map_err(|error| tpde_error(py, &error))
    }

    /// Turns tensors, (address, bytes) of each in the order of `tensors()`, into the final ones where they lie; an
    /// address of 0 leaves one out. They are taken to be in the state `base_id`. Returns the final state's id.
    #[pyo3(signature = (tensors, *, base_id, memory_bytes, threads))]
    fn apply_in_place(
        &self,
        py: Python<'_>,
        tensors: Vec<(usize, usize)>,
        base_id: Option<&str>,
        memory_bytes: usize,
        threads: usize,
    ) -> PyResult<String> {
        let options = Options { memory_bytes, threads };
        let known = state_of(base_id)?;
        py.detach(|| {
            let out = |(address, bytes)| (address != 0 || bytes == 0).then(|| out_at(address, bytes));
            let tensors = tensors.into_iter().map(out).collect();
            apply_in_place(&self.0, known, tensors, &options, &|_, _| ())
        })
        .map(|id| id.to_string())
        .map_err(|error| tpde_error(py, &error))
    }
}
