//! What can go wrong with sessions, with the facts. Whatever it is, every session is where it was.

use std::path::PathBuf;

use crate::session::Refusal;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// See the module.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No session has this number.
    #[error("session {id} is not in this pool")]
    Unknown {
        /// The number.
        id: u64,
    },
    /// The number is taken.
    #[error("session {id} is in this pool already")]
    Exists {
        /// The number.
        id: u64,
    },
    /// The session is not in a state that allows the call.
    #[error("session {id} {refusal}")]
    Refused {
        /// The session.
        id: u64,
        /// Why.
        refusal: Refusal,
    },
    /// A session does not fit a slab.
    #[error("session {id} would have {tokens} tokens; a slab of this pool holds {limit_tokens}")]
    TooLong {
        /// The session.
        id: u64,
        /// Tokens it would have.
        tokens: usize,
        /// Tokens a slab holds.
        limit_tokens: usize,
    },
    /// The arena is too small for a single session.
    #[error("an arena of {arena_bytes} bytes holds no slab of {slab_bytes} bytes")]
    Arena {
        /// Bytes of the arena.
        arena_bytes: usize,
        /// Bytes of a slab.
        slab_bytes: usize,
    },
    /// Every slab belongs to a session that computes.
    #[error("all {slabs} slabs belong to sessions that are running")]
    NoSlab {
        /// Slabs of the arena.
        slabs: usize,
    },
    /// A slab was given back twice, or by someone who no longer has it.
    #[error("slab {slab} is at generation {found}, the caller's seat is of generation {expected}")]
    StaleSeat {
        /// Which slab.
        slab: usize,
        /// Generation of the seat.
        expected: u64,
        /// Generation of the slab.
        found: u64,
    },
    /// A saved session is not what it should be.
    #[error("{} is not a whole saved session of this pool: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A saved session cannot be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        reason: String,
    },
    /// A tier or a transfer.
    #[error(transparent)]
    Engine(#[from] overspill_engine::Error),
}

impl From<overspill_device::Error> for Error {
    fn from(error: overspill_device::Error) -> Self {
        Self::Engine(error.into())
    }
}

impl Error {
    /// Whether a tier had no room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Engine(overspill_engine::Error::Full { .. }))
    }
}
