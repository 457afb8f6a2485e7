//! The one error type of the codec.

use thiserror::Error;

/// What can be wrong with arguments or with encoded bytes. Decoders return these and never panic.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CodecError {
    /// A slice's length is not what the segment's word count asks for.
    #[error("{what} holds {found_bytes} bytes, {expected_bytes} expected")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Bytes that the segment's shape asks for.
        expected_bytes: u64,
        /// Bytes given.
        found_bytes: u64,
    },
    /// A count beyond the format's limits.
    #[error("{what} is {found}, the limit is {limit}")]
    Limit {
        /// Which count.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// A head, index record or payload ends early or says something that no encoder writes.
    #[error("bad {what}: {why}")]
    Malformed {
        /// Which part of the encoding.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A chunk's payload does not have the check its record promises.
    #[error("chunk {chunk}: payload check {found:08x}, record says {expected:08x}")]
    Check {
        /// Chunk number within its segment.
        chunk: usize,
        /// The record's check.
        expected: u32,
        /// The payload's check.
        found: u32,
    },
    /// The segment was encoded against a base and none (or another kind) was given, or the reverse.
    #[error("base mismatch: {why}")]
    Base {
        /// What disagrees.
        why: &'static str,
    },
}

impl CodecError {
    pub(crate) fn malformed(what: &'static str, why: &'static str) -> Self {
        CodecError::Malformed { what, why }
    }
}
