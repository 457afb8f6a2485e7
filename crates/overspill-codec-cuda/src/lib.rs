#![deny(unsafe_code)]
//! Codecs on a CUDA device: TPDE patches, in place or into other memory, and the link codec ([`LinkCodec`]);
//! beside them what STORM rebuilds with kernels of its own ([`Again`]).
//!
//! The host parses and checks heads and records ([`overspill_codec::FlatTables`]); [`plan`] lays them out for the
//! kernels (`overspill-device/src/kernels/tpde*`), one launch for each mode and word size; [`Decoder`] runs it.
//! [`StateHasher`] makes state ids of words on the device, and [`StepEncoder`] whole patches of two states there.
//! What the kernels do not hold (mode elias-zstd, words of 64 bits, chunks beyond a block's shared memory) comes
//! back as a list of chunks for the reference decoder. [`DevicePatch`] is a patch in device
//! memory, whose chunks of that kind it decodes itself; of a [`StreamedPatch`] only records and tables are there, and
//! payloads pass through. Callers bring addresses.

mod again;
mod decoder;
mod landing;
mod link;
mod pack;
pub mod pack_plan;
mod pack_planes;
mod pack_round;
pub mod plan;
mod resident;
pub mod state;
mod step;
mod streamed;

pub use again::{Again, NormPlaces};
pub use decoder::{Applied, Decoder, DeviceTables, Error, Result};
pub use landing::HostBuffers;
pub use link::{LinkCodec, LinkPlaces};
pub use pack::{Packed, PackedSegment, Packer};
pub use pack_plan::{PackJob, PackMode};
pub use plan::{Job, LeftChunk, Plan};
pub use resident::{DevicePatch, Place};
pub use state::StateHasher;
pub use step::{Resident, StepEncoder};
pub use streamed::{Placed, StreamedPatch};
