//! The native module of overspill: wraps the crates, maps errors, releases the GIL.
//!
//! No algorithms here. Addresses of tensors cross this border as integers together with the Python
//! object that keeps them alive ([`again`], [`engine::lease`], [`link`], [`tpde`] and [`tpde_device`] are the only
//! places that trust one).

mod again;
mod chain;
mod djinn;
mod engine;
mod errors;
mod link;
mod server;
mod storm;
mod tpde;
mod tpde_device;
mod tpde_step;

use pyo3::prelude::*;

/// The native half of overspill; use it through the `overspill` package.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::again::Again;
    #[pymodule_export]
    use crate::chain::TpdeChain;
    #[pymodule_export]
    use crate::djinn::DjinnPool;
    #[pymodule_export]
    use crate::engine::{Engine, Mark, Onboarding, Slot};
    #[pymodule_export]
    use crate::link::LinkCodec;
    #[pymodule_export]
    use crate::server::serve;
    #[pymodule_export]
    use crate::storm::Planner;
    #[pymodule_export]
    use crate::tpde::{TpdePatch, tpde_pack, tpde_quantize, tpde_state_id};
    #[pymodule_export]
    use crate::tpde_device::{HostMemory, TpdeDevicePatch, TpdePlaced, TpdeStreamedPatch};
    #[pymodule_export]
    use crate::tpde_step::{tpde_device_state_id, tpde_encode};

    /// Anonymous and all resident bytes of this process; zeros where the system does not say.
    #[pyfunction]
    fn process_memory() -> (u64, u64) {
        overspill_device::process_memory().map_or((0, 0), |m| (m.anonymous_bytes, m.resident_bytes))
    }

    /// Most bytes of this process that were ever resident; 0 where the system does not say.
    #[pyfunction]
    fn resident_peak_bytes() -> u64 {
        overspill_device::resident_peak_bytes().unwrap_or(0)
    }

    /// Makes malloc give freed tensors back to the operating system at once.
    #[pyfunction]
    fn return_freed_tensors() {
        overspill_device::return_freed_tensors();
    }

    /// Runs the `overspill` command line, program name first, and returns its exit code.
    #[pyfunction]
    fn run_cli(py: Python<'_>, args: Vec<std::ffi::OsString>) -> u8 {
        py.detach(|| overspill_cli::run_with(args, crate::server::serve_command))
    }

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    use super::{Python, pyfunction};
}
