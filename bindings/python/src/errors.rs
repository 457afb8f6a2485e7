//! Rust errors as Python exceptions, with their facts as attributes.

use overspill_engine::{Error as EngineError, Tier};
use overspill_storm::Error as StormError;
use pyo3::{create_exception, exceptions::PyException, prelude::*, types::PyDict};

create_exception!(overspill, OverspillError, PyException, "Anything that overspill reports.");
create_exception!(overspill, BudgetError, OverspillError, "A memory or disk budget cannot be kept.");
create_exception!(overspill, FormatError, OverspillError, "A file or a buffer is not what it should be.");
create_exception!(
    overspill,
    TransferError,
    OverspillError,
    "Bytes could not be moved; they are where they were."
);
create_exception!(
    overspill,
    DeviceError,
    OverspillError,
    "The device is missing, too old, or refused a call."
);

/// An exception of `class` saying `error`, with `facts` as attributes.
fn raise<C: pyo3::type_object::PyTypeInfo>(
    py: Python<'_>,
    error: &dyn std::fmt::Display,
    facts: impl FnOnce(&Bound<'_, PyDict>) -> PyResult<()>,
) -> PyErr {
    let attributes = PyDict::new(py);
    let made = facts(&attributes).and_then(|()| {
        let value = py.get_type::<C>().call1((error.to_string(),))?;
        for (name, fact) in attributes {
            value.setattr(name.cast::<pyo3::types::PyString>()?, fact)?;
        }
        Ok(PyErr::from_value(value))
    });
    made.unwrap_or_else(|failure| failure)
}

/// An engine's error.
pub fn engine_error(error: &EngineError) -> PyErr {
    Python::attach(|py| match error {
        EngineError::Full { tier, requested_bytes, available_bytes, budget_bytes, .. } => {
            raise::<BudgetError>(py, error, |facts| {
                facts.set_item("tier", tier.to_string())?;
                facts.set_item("requested_bytes", requested_bytes)?;
                facts.set_item("available_bytes", available_bytes)?;
                facts.set_item("budget_bytes", budget_bytes)
            })
        }
        EngineError::Device(error) => device_error(py, error),
        EngineError::SpillDir { path, .. } => raise::<TransferError>(py, error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("path", path)
        }),
        EngineError::Io { offset_bytes, bytes, .. } => raise::<TransferError>(py, error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("offset_bytes", offset_bytes)?;
            facts.set_item("requested_bytes", bytes)
        }),
        EngineError::Checksum { offset_bytes, .. } => raise::<TransferError>(py, error, |facts| {
            facts.set_item("tier", Tier::Disk.to_string())?;
            facts.set_item("offset_bytes", offset_bytes)
        }),
        EngineError::SizeMismatch { slot_bytes, destination_bytes } => {
            raise::<TransferError>(py, error, |facts| {
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
            raise::<BudgetError>(py, error, |facts| {
                facts.set_item("tier", tier)?;
                facts.set_item("requested_bytes", requested_bytes)?;
                facts.set_item("available_bytes", available_bytes)
            })
        }
        _ => raise::<DeviceError>(py, error, |_| Ok(())),
    }
}

/// A planner's error.
pub fn storm_error(error: &StormError) -> PyErr {
    let StormError::Budget { requested_bytes, available_bytes, budget_bytes, .. } = error;
    Python::attach(|py| {
        raise::<BudgetError>(py, error, |facts| {
            facts.set_item("tier", Tier::Device.to_string())?;
            facts.set_item("requested_bytes", requested_bytes)?;
            facts.set_item("available_bytes", available_bytes)?;
            facts.set_item("budget_bytes", budget_bytes)
        })
    })
}
