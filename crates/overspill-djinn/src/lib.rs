#![forbid(unsafe_code)]
//! Djinn: more inference sessions than the device holds.
//!
//! A session is the keys and values of one conversation, private and append-only. A [`Pool`] keeps
//! the sessions that compute in an arena of equal slabs on the device; each one's host copy follows
//! layer by layer as tokens are written, so that a pause costs about a layer and the eviction of a
//! clean session nothing at all.
//!
//! [`Session`] is the state machine, pure; [`Arena`] owns the slabs and says what their next user
//! has to wait for; [`scheduler`] decides who is where, also pure; [`Pool`] executes; [`simulate`] runs the
//! scheduler in simulated time against other rules. What this crate does not do: the model's maths, the hidden
//! state and the sampler of a paused session (the Python edge has them), who may ask for a turn (the server).

mod arena;
mod counters;
mod disk;
mod error;
mod geometry;
mod host_copy;
mod log;
mod placement;
mod pool;
mod saved;
pub mod scheduler;
mod session;
pub mod simulate;
mod swap;
mod turns;

pub use arena::{Arena, Seat};
pub use counters::Counters;
pub use error::{Error, Result};
pub use geometry::{Geometry, Part};
pub use log::{Cause, Swap};
pub use pool::{Begun, Pool, PoolConfig};
pub use session::{Mark, Refusal, Residency, Session};
