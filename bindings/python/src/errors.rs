//! Rust errors as the exceptions of `overspill.errors`, with their facts as attributes.

use overspill_engine::{Error as EngineError, Tier};
use overspill_storm::Error as StormError;
use pyo3::{prelude::*, types::PyDict};

/// The exception `class` of `overspill.errors` saying `error`, with `facts` as attributes.
pub fn raise(
    py: Python<'_>,
    class: &str,
    error: &dyn std::fmt::Display,
    facts: impl FnOnce(&Bound<'_, PyDict>) -> PyResult<()>,
) -> PyErr {
    let attributes = PyDict::new(py);
    let made = facts(&attributes).and_then(|()| {
        let class = py.import("overspill.errors")?.getattr(class)?;
        class.call((error.to_string(),), Some(&attributes))
    });
    made.map_or_else(|failure| failure, PyErr::from_value)
}

/// An engine's error.
pub fn engine_error(error: &EngineError) -> PyErr {
    Python::attach(|py| match error {
        EngineError::Full { tier, requested_bytes, available_bytes, budget_bytes, .. } => {
            raise(py, "BudgetError", error, |facts| {
                facts.set_item("tier", tier.to_string())?;
                facts.set_item("requested_bytes", requested_bytes)?;
                facts.set_item("available_bytes", available_bytes)?;
                facts.set_item("budget_bytes", budget_bytes)
            })
        }
        EngineError::Device(error) => device_error(py, error),
        EngineError::SpillDir { path, .. } => raise(py, "TransferError", error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("path", path.to_string_lossy())
        }),
        EngineError::Io { offset_bytes, bytes, .. } => raise(py, "TransferError", error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("offset_bytes", offset_bytes)?;
            facts.set_item("requested_bytes", bytes)
        }),
        EngineError::Checksum { offset_bytes, .. } => raise(py, "TransferError", error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("offset_bytes", offset_bytes)
        }),
        EngineError::SizeMismatch { slot_bytes, destination_bytes } => {
            raise(py, "TransferError", error, |facts| {
                facts.set_item("requested_bytes", slot_bytes)?;
                facts.set_item("available_bytes", destination_bytes)
            })
        }
    })
}

/// A device's error.
pub fn device_error(py: Python<'_>, error: &overspill_device::Error) -> PyErr {
    use overspill_device::Error;
    match error {
        Error::OutOfMemory { tier, requested_bytes, available_bytes } => {
            raise(py, "BudgetError", error, |facts| {
                facts.set_item("tier", tier)?;
                facts.set_item("requested_bytes", requested_bytes)?;
                facts.set_item("available_bytes", available_bytes)
            })
        }
        _ => raise(py, "DeviceError", error, |_| Ok(())),
    }
}

/// A planner's error.
pub fn storm_error(error: &StormError) -> PyErr {
    let StormError::Budget { requested_bytes, available_bytes, budget_bytes, .. } = error;
    Python::attach(|py| {
        raise(py, "BudgetError", error, |facts| {
            facts.set_item("tier", Tier::Device.to_string())?;
            facts.set_item("requested_bytes", requested_bytes)?;
            facts.set_item("available_bytes", available_bytes)?;
            facts.set_item("budget_bytes", budget_bytes)
        })
    })
}

/// An error about sessions.
pub fn djinn_error(py: Python<'_>, error: &overspill_djinn::Error) -> PyErr {
    use overspill_djinn::Error;
    match error {
        Error::Engine(error) => engine_error(error),
        Error::Damaged { path, .. } => {
            raise(py, "FormatError", error, |facts| facts.set_item("path", path.to_string_lossy()))
        }
        Error::File { path, .. } => raise(py, "TransferError", error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("path", path.to_string_lossy())
        }),
        Error::Arena { arena_bytes, slab_bytes } => raise(py, "BudgetError", error, |facts| {
            facts.set_item("tier", Tier::Device.to_string())?;
            facts.set_item("requested_bytes", slab_bytes)?;
            facts.set_item("available_bytes", arena_bytes)
        }),
        Error::NoSlab { .. } => {
            raise(py, "BudgetError", error, |facts| facts.set_item("tier", Tier::Device.to_string()))
        }
        Error::TooLong { id, tokens, limit_tokens } => raise(py, "SessionError", error, |facts| {
            facts.set_item("session", id)?;
            facts.set_item("tokens", tokens)?;
            facts.set_item("limit_tokens", limit_tokens)
        }),
        Error::Unknown { id } | Error::Exists { id } | Error::Refused { id, .. } => {
            raise(py, "SessionError", error, |facts| facts.set_item("session", id))
        }
        Error::StaleSeat { .. } => raise(py, "SessionError", error, |_| Ok(())),
    }
}

/// An error about checkpoints and patches.
pub fn tpde_error(py: Python<'_>, error: &overspill_tpde::Error) -> PyErr {
    use overspill_tpde::Error;
    match error {
        Error::Format { path, place, .. } => raise(py, "FormatError", error, |facts| {
            facts.set_item("path", path.to_string_lossy())?;
            facts.set_item("tensor", &place.tensor)?;
            facts.set_item("offset_bytes", place.offset_bytes)
        }),
        Error::WrongBase { path, expected, found } => raise(py, "FormatError", error, |facts| {
            facts.set_item("path", path.to_string_lossy())?;
            facts.set_item("expected_state", expected.to_string())?;
            facts.set_item("found_state", found.to_string())
        }),
        Error::Io { path, .. } => raise(py, "TransferError", error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("path", path.to_string_lossy())
        }),
        _ => pyo3::exceptions::PyValueError::new_err(error.to_string()),
    }
}

/// An error about chains.
pub fn chain_error(py: Python<'_>, error: &overspill_chain::Error) -> PyErr {
    use overspill_chain::Error;
    match error {
        Error::Tpde(error) => tpde_error(py, error),
        Error::NotAChain { path, .. } | Error::Damaged { path, .. } => {
            raise(py, "FormatError", error, |facts| facts.set_item("path", path.to_string_lossy()))
        }
        Error::Io { path, .. } | Error::Locked { path, .. } => raise(py, "TransferError", error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("path", path.to_string_lossy())
        }),
        _ => pyo3::exceptions::PyValueError::new_err(error.to_string()),
    }
}
