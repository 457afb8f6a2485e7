//! The native module of overspill.
