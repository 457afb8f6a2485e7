//! Sources of the kernels: CUDA C++ carried as text and compiled by [`crate::nvrtc`] at first use.

/// One file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// File name, for messages of the compiler.
    pub name: &'static str,
    /// The text.
    pub text: &'static str,
    /// Options for the compiler besides the architecture and the language.
    pub options: &'static [&'static str],
}

/// Fill, fold, copy, compare and spin.
pub const MEMORY: Source = Source { name: "memory.cu", text: include_str!("memory.cu"), options: &[] };

/// Decoders of TPDE's chunk modes; `overspill-tpde-cuda` launches them.
pub const TPDE: Source = Source {
    name: "tpde.cu",
    text: concat!(include_str!("tpde.cuh"), include_str!("tpde_sparse.cu"), include_str!("tpde_lanes.cu")),
    options: &[],
};

/// Every file, for builds that compile them all.
pub const ALL: &[Source] = &[MEMORY, TPDE];
