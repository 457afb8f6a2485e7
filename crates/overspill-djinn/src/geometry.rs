//! Where a session's bytes lie in its slab: `[layer][K | V][token][head][dim]`.
//!
//! What a step adds to a layer is then two runs, whatever the number of heads.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Keys.
    Keys = 0,
    /// Values.
    Values = 1,
}

impl Part {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Keys, Self::Values];
}

/// Runs start on this, as torch's CUDA allocations do: kernels are chosen by alignment.
const ALIGN_BYTES: usize = 512;

/// Shape of every session of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Decoder layers.
    pub layers: usize,
    /// Tokens that a slab holds: the longest session.
    pub tokens: usize,
    /// Bytes of the keys of one token in one layer; the values take as many.
    pub token_bytes: usize,
}

impl Geometry {
    /// Bytes of one part of one layer, from the start of it to the start of the next.
    #[must_use]
    pub fn run_bytes(&self) -> usize {
        (self.tokens * self.token_bytes).next_multiple_of(ALIGN_BYTES)
    }

    /// Bytes of one session's slab.
    #[must_use]
    pub fn slab_bytes(&self) -> usize {
        2 * self.layers * self.run_bytes()
    }

    /// Bytes that one more token adds to a session, all layers together.
    #[must_use]
    pub fn step_bytes(&self) -> usize {
        2 * self.layers * self.token_bytes
    }

    /// Where in its slab `tokens` of a part of a layer lie.
    #[must_use]
    pub fn bytes_of(&self, layer: usize, part: Part, tokens: Range<usize>) -> Range<usize> {
        let start = (2 * layer + part as usize) * self.run_bytes();
        start + tokens.start * self.token_bytes..start + tokens.end * self.token_bytes
    }
}
