#![forbid(unsafe_code)]
//! Weights as lossless deltas to a base: checkpoints in, `.tpde` patches out, and back, bit for bit.
//!
//! | module | job |
//! |---|---|
//! | [`checkpoint`] | tensors of safetensors files (one or sharded), GGUF bases, or memory |
//! | [`state`] | content ids of states |
//! | [`container`] | the `.tpde` file: a safetensors file of four sections |
//! | [`pack`], [`apply`], [`apply_two`], [`flatten`], [`apply_in_place`], [`verify`], [`inspect`], [`diff`] | the operations |
//! | [`Parts`] | a patch of segments that were hashed and encoded elsewhere |
//! | [`decode_tensor`], [`quantize`] | one tensor of a patch at a time; 4-bit bases |
//!
//! The codec itself is `overspill-codec`; this crate owns files, memory bounds, threads and authentication.
//! Every operation streams by segment and keeps within [`Options::memory_bytes`]. Outputs are written beside
//! their target and renamed when they are complete, on disk and checked. It knows no command line, no Python
//! and no device.

mod apply;
mod apply_two;
mod buffer;
pub mod checkpoint;
pub mod container;
mod diff;
mod error;
mod flatten;
mod gguf;
mod in_place;
mod inspect;
mod manifest;
mod output;
mod pack;
mod parts;
mod safetensors;
pub mod state;
mod store;
mod tensor;
mod verify;
mod work;

pub use apply::{apply, apply_into};
pub use apply_two::apply_two;
pub use checkpoint::{Checkpoint, Kind, Tensor};
pub use container::{Patch, PatchType};
pub use diff::{Change, Diff, TensorDiff, diff};
pub use error::Error;
pub use flatten::flatten;
pub use in_place::{SegmentParts, apply_in_place, expect_base, expect_in_place};
pub use inspect::{Inspection, TensorReport, inspect, mode_names};
pub use manifest::{Entry, Manifest};
pub use overspill_codec::{BaseKind, CodecChoice, Dtype, QuantLayout};
pub use pack::{PackOptions, PackReport, pack, pack_to_pieces};
pub use parts::{BlobHasher, Coded, LARGE_BLOB_START, Parts};
pub use state::{SegmentHash, StateId, hash_segment, state_id, state_id_of};
pub use tensor::{authenticate, decode_tensor, dequantize, quantize};
pub use verify::{Verification, verify};
pub use work::{Options, Progress, stop};

/// What the operations of this crate return.
pub type Result<T> = std::result::Result<T, Error>;
