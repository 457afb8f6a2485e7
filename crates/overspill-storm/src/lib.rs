#![forbid(unsafe_code)]
//! What to keep, to rebuild and to offload of a training step.
//!
//! Autograd saves tensors in forward and asks for them in backward. The edge to PyTorch reports
//! each saved piece of storage (a *unit*) to a [`Planner`]; the planner records the step
//! ([`StepRecord`]), and from the second step on answers from a [`Plan`]. [`make_plan`] is a pure
//! function of a record and [`Limits`]; [`simulate`] prices any plan on any link. Nothing here
//! touches memory, streams or Python.

mod blocks;
mod plan;
mod planner;
mod profile;
mod record;
mod search;
mod simulate;

pub use blocks::{Shape, Speeds};
pub use plan::{Action, Limits, Plan};
pub use planner::{Error, Planner, Sample, UnitId};
pub use record::{Coded, Event, Recipe, StepRecord, Unit};
pub use search::make_plan;
pub use simulate::{Link, Prediction, Schedule, simulate};
