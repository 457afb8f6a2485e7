//! The native module of overspill: wraps the crates, maps errors, releases the GIL.
//!
//! No algorithms here. Addresses of tensors cross this border as integers together with the Python
//! object that keeps them alive ([`engine::lease`] is the only place that trusts one).

mod engine;
mod errors;
mod storm;

use pyo3::prelude::*;

/// The native half of overspill; use it through the `overspill` package.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::engine::{Engine, Onboarding, Slot};
    #[pymodule_export]
    use crate::storm::Planner;

    /// Bytes that malloc has handed out in this process and not got back.
    #[pyfunction]
    fn malloc_bytes_in_use() -> u64 {
        overspill_device::malloc_bytes_in_use()
    }

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    use super::pyfunction;
}
