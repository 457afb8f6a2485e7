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

/// Decoders of TPDE's chunk modes; `overspill-codec-cuda` launches them.
pub const TPDE: Source = Source {
    name: "tpde.cu",
    text: concat!(
        include_str!("tpde.cuh"),
        include_str!("tpde_window.cuh"),
        include_str!("tpde_sparse.cu"),
        include_str!("tpde_lanes.cu"),
        include_str!("tpde_flags.cu"),
        include_str!("tpde_groups.cu")
    ),
    options: &[],
};

/// Encoders of TPDE's modes S, F and W; `overspill-codec-cuda` launches them.
pub const TPDE_ENCODE: Source = Source {
    name: "tpde_encode.cu",
    text: concat!(
        include_str!("tpde.cuh"),
        include_str!("tpde_window.cuh"),
        include_str!("tpde_encode.cu"),
        include_str!("tpde_encode_flags.cu"),
        include_str!("tpde_encode_planes.cu")
    ),
    options: &[],
};

/// State ids of words in device memory; `overspill-codec-cuda` launches it.
pub const STATE: Source = Source { name: "state.cu", text: include_str!("state.cu"), options: &[] };

/// The link codec of 16-bit activations; `overspill-codec-cuda` launches it.
pub const LINK: Source = Source { name: "link.cu", text: include_str!("link.cu"), options: &[] };

/// What STORM rebuilds in one launch; `overspill-codec-cuda` launches it.
pub const REBUILD: Source = Source { name: "rebuild.cu", text: include_str!("rebuild.cu"), options: &[] };

/// Every file, for builds that compile them all.
pub const ALL: &[Source] = &[MEMORY, TPDE, TPDE_ENCODE, STATE, LINK, REBUILD];
