#![forbid(unsafe_code)]
//! See `ARCHITECTURE.md` for the place of this crate.
