//! The native module of overspill: wraps the crates, maps errors, releases the GIL.
//!
//! No algorithms here. Addresses of tensors cross this border as integers together with the Python
//! object that keeps them alive ([`engine::lease`] and [`tpde`] are the only places that trust one).

mod engine;
mod errors;
mod storm;
mod tpde;

use pyo3::prelude::*;

/// The native half of overspill; use it through the `overspill` package.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::engine::{Engine, Onboarding, Slot};
    #[pymodule_export]
    use crate::storm::Planner;
    #[pymodule_export]
    use crate::tpde::{TpdePatch, tpde_pack};

    /// Bytes that malloc has handed out in this process and not got back.
    #[pyfunction]
    fn malloc_bytes_in_use() -> u64 {
        overspill_device::malloc_bytes_in_use()
    }

    /// Runs the `overspill` command line, program name first, and returns its exit code.
    #[pyfunction]
    fn run_cli(py: Python<'_>, args: Vec<std::ffi::OsString>) -> u8 {
        py.detach(|| overspill_cli::run(args))
    }

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    use super::{Python, pyfunction};
}
