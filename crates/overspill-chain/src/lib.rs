#![forbid(unsafe_code)]
//! Every checkpoint of a training run in one folder, in a fraction of the bytes, each restored bit for bit.
//!
//! A step is a `.tpde` patch to an *anchor*, an anchor a patch to a *keyframe*, a keyframe a plain safetensors
//! file: any step is there after two applications. Which step becomes what is [`policy`]'s choice, from the bytes
//! alone. A step is committed when its record is renamed into place, after everything that it names is durable;
//! so a reader sees all of a step or nothing, whatever happens to the writer.
//!
//! ```text
//! CHAIN/chain.json    format and version
//!       objects/      keyframes and patches, named by the BLAKE3 of their bytes
//!       steps/        one record a step, named by the step
//!       cache/        states that the writer rebuilds when they are gone
//!       lock          the operating system's lock of the one writer
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`Chain`] | open, commit, log, restore |
//! | [`verify`](Chain::verify), [`gc`](Chain::gc) | check all, drop what is not wanted |
//! | [`policy`] | keyframe, anchor or step |
//! | [`record`] | a step's file |
//! | [`files`] | the seam to the file system, where tests crash |
//!
//! It knows no command line, no Python and no device. Weights themselves are coded by `overspill-tpde`.

mod chain;
mod error;
pub mod files;
mod gc;
mod lineage;
mod lock;
pub mod policy;
pub mod record;
mod restore;
mod verify;

pub use chain::{Chain, PARAMS};
pub use error::Error;
pub use gc::{Collected, Keep};
pub use policy::Role;
pub use record::{Object, Part, Record};
pub use verify::Verified;

/// What the operations of this crate return.
pub type Result<T> = std::result::Result<T, Error>;
