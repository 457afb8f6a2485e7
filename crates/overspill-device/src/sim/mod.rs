//! The simulated device (to come).
