//! Checkpoints: named tensors and where their bytes lie.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use overspill_codec::{BaseKind, Dtype, QuantLayout, SEGMENT_WORDS};
use serde::{Deserialize, Serialize};

use crate::buffer::Buffer;
use crate::safetensors::{Metadata, read_header};
use crate::store::Store;
use crate::{Error, Result, gguf};

/// Largest tensor that is believed, far beyond any real one: keeps sums from overflowing.
const MAX_TENSOR_BYTES: u64 = 1 << 48;

/// What a tensor's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Elements of a safetensors dtype.
    Plain(Dtype),
    /// Blocks of quantized weights, in a GGUF base.
    Quantized(QuantLayout),
}

impl Kind {
    /// Bytes of `words` coded words; a whole number of blocks where quantized.
    pub fn bytes_of(self, words: u64) -> u64 {
        match self {
            Kind::Plain(dtype) => words * dtype.word_bytes() as u64,
            Kind::Quantized(layout) => words / QuantLayout::BLOCK_WORDS as u64 * layout.block_bytes() as u64,
        }
    }

    /// Bytes of a tensor of this shape, or `None` if that is no whole number or beyond the limit.
    pub(crate) fn tensor_bytes(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
        let bytes = match self {
            Kind::Plain(dtype) => {
                let bits = elements.checked_mul(u64::from(dtype.element_bits()))?;
                bits.is_multiple_of(8).then_some(bits / 8)?
            }
            Kind::Quantized(layout) => {
                let row = shape.last().copied().unwrap_or(1);
                let block = QuantLayout::BLOCK_WORDS as u64;
                row.is_multiple_of(block)
                    .then_some(elements / block)?
                    .checked_mul(layout.block_bytes() as u64)?
            }
        };
        (bytes <= MAX_TENSOR_BYTES).then_some(bytes)
    }

    /// Whether elements are 16- or 32-bit floats, which a quantized base may stand for.
    pub(crate) fn can_be_quantized(self) -> bool {
        matches!(self, Kind::Plain(Dtype::F16 | Dtype::Bf16 | Dtype::F32))
    }

    /// Code in state ids: the format's dtype code, or 128 and the base kind's.
    pub(crate) fn code(self) -> u8 {
        match self {
            Kind::Plain(dtype) => dtype.code(),
            Kind::Quantized(layout) => 128 + base_code(BaseKind::Quantized(layout)),
        }
    }

    /// The kind of that [`Kind::name`].
    pub fn from_name(name: &str) -> Option<Kind> {
        let layouts = [QuantLayout::Q4_0, QuantLayout::Q4_1, QuantLayout::Q8_0];
        let quantized = layouts.map(Kind::Quantized).into_iter().find(|kind| kind.name() == name);
        quantized.or_else(|| Dtype::from_name(name).map(Kind::Plain))
    }

    /// Name for people: the safetensors dtype or the GGUF type.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Plain(dtype) => dtype.name(),
            Kind::Quantized(QuantLayout::Q4_0) => "Q4_0",
            Kind::Quantized(QuantLayout::Q4_1) => "Q4_1",
            Kind::Quantized(QuantLayout::Q8_0) => "Q8_0",
        }
    }
}

const BASE_KINDS: [BaseKind; 5] = [
    BaseKind::None,
    BaseKind::Words,
    BaseKind::Quantized(QuantLayout::Q4_0),
    BaseKind::Quantized(QuantLayout::Q4_1),
    BaseKind::Quantized(QuantLayout::Q8_0),
];

/// The container's code of a base kind.
pub(crate) fn base_code(kind: BaseKind) -> u8 {
    BASE_KINDS.iter().position(|&k| k == kind).unwrap_or(0) as u8
}

/// Inverse of [`base_code`].
pub(crate) fn base_from_code(code: u8) -> Option<BaseKind> {
    BASE_KINDS.get(usize::from(code)).copied()
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// What its bytes are.
    pub kind: Kind,
    /// Elements along each dimension; none for a scalar.
    pub shape: Vec<u64>,
    /// Which of the checkpoint's files holds it.
    pub(crate) store: usize,
    /// Where in that file.
    pub(crate) offset_bytes: u64,
    /// Its size.
    pub bytes: u64,
}

impl Tensor {
    /// Coded words (weights, where quantized).
    pub fn words(&self) -> u64 {
        match self.kind {
            Kind::Plain(dtype) => self.bytes / dtype.word_bytes() as u64,
            Kind::Quantized(layout) => {
                self.bytes / layout.block_bytes() as u64 * QuantLayout::BLOCK_WORDS as u64
            }
        }
    }

    /// Words of a row (the last dimension), or 0 where rows are not whole words.
    pub fn row_words(&self) -> u64 {
        let rows = self.shape.iter().rev().skip(1).try_fold(1u64, |product, &dim| product.checked_mul(dim));
        match rows {
            Some(rows) if rows > 0 && self.words().is_multiple_of(rows) => self.words() / rows,
            _ => 0,
        }
    }

    /// The bytes of `words` words from `first_word`.
    pub(crate) fn read<'b>(
        &self,
        store: &'b Store<'_>,
        first_word: u64,
        words: usize,
        scratch: &'b mut Buffer,
    ) -> Result<&'b [u8]> {
        let offset_bytes = self.offset_bytes + self.kind.bytes_of(first_word);
        store.read(offset_bytes, self.kind.bytes_of(words as u64) as usize, scratch)
    }

    /// Fills `room` with the bytes from `first_word` on.
    pub(crate) fn read_into(&self, store: &Store<'_>, first_word: u64, room: &mut [u8]) -> Result<()> {
        store.read_into(self.offset_bytes + self.kind.bytes_of(first_word), room)
    }
}

/// How tensors are spread over files; what state ids do not see and patches keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Layout {
    /// The files, each with the number of tensors it holds.
    pub files: Vec<FileLayout>,
    /// `metadata` of the index of a sharded checkpoint; absent for a single file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<serde_json::Value>,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileLayout {
    /// Its name, without a folder.
    pub name: String,
    /// Tensors in it.
    pub tensors: usize,
    /// `__metadata__` of its header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
}

/// Named tensors in files or in memory. Nothing but headers is read until an operation asks.
#[derive(Debug)]
pub struct Checkpoint<'a> {
    pub(crate) path: PathBuf,
    stores: Vec<Store<'a>>,
    tensors: Vec<Tensor>,
    by_name: Vec<usize>,
    pub(crate) layout: Layout,
}

/// A tensor in memory, for [`Checkpoint::from_memory`].
#[derive(Debug, Clone)]
pub struct MemoryTensor<'a> {
    /// Its name.
    pub name: String,
    /// What its bytes are; only a base may be quantized.
    pub kind: Kind,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// Its bytes, contiguous, row-major, little endian.
    pub bytes: &'a [u8],
}

impl<'a> Checkpoint<'a> {
    /// Opens a safetensors file, a sharded checkpoint (its folder or its index file) or a GGUF file.
    ///
    /// # Errors
    /// Files that cannot be read, malformed headers, an index that does not match its shards.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::open(&find_in_folder(path)?);
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => Self::open_sharded(path),
            Some("gguf") => {
                let store = Store::open(path)?;
                let tensors = gguf::read_header(&store)?;
                Self::single(path, store, tensors, None)
            }
            _ => {
                let store = Store::open(path)?;
                let header = read_header(&store, 0)?;
                Self::single(path, store, header.tensors, header.metadata)
            }
        }
    }

    fn single(
        path: &Path,
        store: Store<'a>,
        tensors: Vec<Tensor>,
        metadata: Option<Metadata>,
    ) -> Result<Self> {
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let files = vec![FileLayout { name, tensors: tensors.len(), metadata }];
        Self::new(path, vec![store], tensors, Layout { files, index: None })
    }

    fn open_sharded(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            #[serde(default)]
            metadata: Option<serde_json::Value>,
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|e| Error::format(path, format!("bad index: {e}")))?;
        let names: std::collections::BTreeSet<&String> = index.weight_map.values().collect();
        let (mut stores, mut tensors, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for name in names {
            if !is_plain_name(name) {
                return Err(Error::format(path, format!("shard name {name:?} is not a plain file name")));
            }
            let store = Store::open(&path.with_file_name(name))?;
            let header = read_header(&store, stores.len())?;
            let stray = header.tensors.iter().find(|t| index.weight_map.get(&t.name) != Some(name));
            if let Some(tensor) = stray {
                return Err(Error::tensor(
                    store.path(),
                    &tensor.name,
                    None,
                    "the index does not put it here",
                ));
            }
            files.push(FileLayout {
                name: name.clone(),
                tensors: header.tensors.len(),
                metadata: header.metadata,
            });
            tensors.extend(header.tensors);
            stores.push(store);
        }
        if tensors.len() != index.weight_map.len() {
            let present: HashSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
            let missing = index.weight_map.keys().find(|name| !present.contains(name.as_str()));
            let cause = "the index names it, no shard holds it";
            return Err(Error::tensor(path, missing.map_or("", String::as_str), None, cause));
        }
        let layout = Layout { files, index: Some(index.metadata.unwrap_or(serde_json::Value::Null)) };
        Self::new(path, stores, tensors, layout)
    }

    /// A checkpoint of tensors in memory, which stands in errors as `label`.
    ///
    /// # Errors
    /// A name given twice, or bytes that are not what dtype and shape ask for.
    pub fn from_memory(label: &str, tensors: Vec<MemoryTensor<'a>>) -> Result<Self> {
        let path = Path::new(label);
        let (mut stores, mut described) = (Vec::new(), Vec::new());
        for (store, tensor) in tensors.into_iter().enumerate() {
            let kind = tensor.kind;
            if kind.tensor_bytes(&tensor.shape) != Some(tensor.bytes.len() as u64) {
                let cause =
                    format!("{} bytes are not {} of {:?}", tensor.bytes.len(), kind.name(), tensor.shape);
                return Err(Error::tensor(path, &tensor.name, None, cause));
            }
            stores.push(Store::memory(path, tensor.bytes));
            let (name, shape, bytes) = (tensor.name, tensor.shape, tensor.bytes.len() as u64);
            described.push(Tensor { name, kind, shape, store, offset_bytes: 0, bytes });
        }
        let name = "model.safetensors".to_owned();
        let files = vec![FileLayout { name, tensors: described.len(), metadata: None }];
        Self::new(path, stores, described, Layout { files, index: None })
    }

    /// A checkpoint of tensors that lie elsewhere, on a device: all but their bytes is known, and whatever reads those
    /// is an error.
    ///
    /// # Errors
    /// A name given twice, or a shape that is no tensor's.
    pub fn elsewhere(label: &str, tensors: Vec<(String, Kind, Vec<u64>)>) -> Result<Self> {
        let path = Path::new(label);
        let describe = |(store, (name, kind, shape)): (usize, (String, Kind, Vec<u64>))| {
            let bytes = kind.tensor_bytes(&shape).ok_or_else(|| {
                Error::tensor(path, &name, None, format!("{shape:?} is no shape of {}", kind.name()))
            })?;
            Ok(Tensor { name, kind, shape, store, offset_bytes: 0, bytes })
        };
        let described: Vec<Tensor> = tensors.into_iter().enumerate().map(describe).collect::<Result<_>>()?;
        let stores = described.iter().map(|_| Store::memory(path, &[])).collect();
        let name = "model.safetensors".to_owned();
        let files = vec![FileLayout { name, tensors: described.len(), metadata: None }];
        // One file holds them all; the stores, which hold nothing, are one a tensor as for tensors in memory.
        Self::new(path, stores, described, Layout { files, index: None })
    }

    fn new(path: &Path, stores: Vec<Store<'a>>, tensors: Vec<Tensor>, layout: Layout) -> Result<Self> {
        let mut by_name: Vec<usize> = (0..tensors.len()).collect();
        by_name.sort_by(|&a, &b| tensors[a].name.cmp(&tensors[b].name));
        if let Some(pair) = by_name.windows(2).find(|pair| tensors[pair[0]].name == tensors[pair[1]].name) {
            return Err(Error::tensor(path, &tensors[pair[0]].name, None, "stands twice"));
        }
        Ok(Checkpoint { path: path.to_owned(), stores, tensors, by_name, layout })
    }

    /// The tensors, in the order of the files and of their bytes.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensors in order of name, which is the order of patches and state ids.
    pub fn sorted(&self) -> impl Iterator<Item = &Tensor> {
        self.by_name.iter().map(|&i| &self.tensors[i])
    }

    /// Indices of [`Checkpoint::tensors`] in order of name.
    pub(crate) fn by_name(&self) -> &[usize] {
        &self.by_name
    }

    /// Index of the tensor of that name.
    pub(crate) fn index_of(&self, name: &str) -> Option<usize> {
        let found = self.by_name.binary_search_by(|&i| self.tensors[i].name.as_str().cmp(name)).ok()?;
        Some(self.by_name[found])
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.index_of(name).map(|index| &self.tensors[index])
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    pub(crate) fn store(&self, tensor: &Tensor) -> &Store<'a> {
        &self.stores[tensor.store]
    }

    /// Raw bytes of the largest segment.
    pub(crate) fn largest_segment_bytes(&self) -> usize {
        let limit = SEGMENT_WORDS as u64;
        self.tensors.iter().map(|t| t.kind.bytes_of(t.words().min(limit)) as usize).max().unwrap_or(0)
    }
}

/// A file name without a folder.
pub(crate) fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref()) && !name.contains('\0')
}

/// The index file of a folder, else its only safetensors file.
fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder, "list"))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(Error::io(folder, "list"))?.path());
    }
    for ending in [".safetensors.index.json", ".safetensors"] {
        let mut found = paths.iter().filter(|path| path.to_string_lossy().ends_with(ending));
        match (found.next(), found.next()) {
            (Some(path), None) => return Ok(path.clone()),
            (Some(_), Some(_)) => {
                return Err(Error::format(folder, format!("holds several *{ending} files: name one")));
            }
            (None, _) => {}
        }
    }
    Err(Error::format(folder, "holds neither a safetensors file nor an index"))
}
