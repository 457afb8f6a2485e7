//! What the scheduler is told about the machine, and the rules that it can be set to.

/// What moving or rebuilding a session costs, as measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// Device to host.
    pub out_us_per_byte: f64,
    /// Host to device.
    pub in_us_per_byte: f64,
    /// Host to disk; `None` without a disk.
    pub write_us_per_byte: Option<f64>,
    /// Disk to host.
    pub read_us_per_byte: f64,
    /// A prefill, a token. `None` where keys and values must come back bit for bit: a prefill gives
    /// other bits than the steps did, so that nothing is ever thrown away.
    pub recompute_us_per_token: Option<f64>,
}

/// Who leaves first of those that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The one that will be needed last.
    NextUse,
    /// The one that was used least recently.
    LastUse,
    /// The one that has had its slab longest.
    FirstIn,
    /// Nobody: a session keeps its slab until it ends.
    Nobody,
}

/// How a session goes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// By whichever way costs less.
    Cheapest,
    /// Always to host memory.
    Swap,
    /// Always thrown away and computed again.
    Discard,
}

/// The rules. All but [`Policy::DJINN`] are what it is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Who leaves.
    pub victim: Victim,
    /// Whether sessions leave before memory is short and come back before they are due.
    pub foresees: bool,
    /// Whether a session leaves whenever it waits.
    pub leaves_at_pause: bool,
    /// How it leaves.
    pub departure: Departure,
}

impl Policy {
    /// The product's.
    pub const DJINN: Self = Self {
        victim: Victim::NextUse,
        foresees: true,
        leaves_at_pause: false,
        departure: Departure::Cheapest,
    };
    /// Least recently used, on demand.
    pub const LRU: Self =
        Self { victim: Victim::LastUse, foresees: false, leaves_at_pause: false, departure: Departure::Swap };
    /// First in, first out, on demand.
    pub const FIFO: Self = Self { victim: Victim::FirstIn, ..Self::LRU };
    /// Out at each pause, back on demand.
    pub const ALWAYS_SWAP: Self = Self { leaves_at_pause: true, ..Self::LRU };
    /// Nobody leaves; who has no slab waits for a session to end.
    pub const NEVER_SWAP: Self = Self { victim: Victim::Nobody, ..Self::LRU };
    /// Least recently used, thrown away and computed again.
    pub const RECOMPUTE: Self = Self { departure: Departure::Discard, ..Self::LRU };
}

/// How a scheduler is set up.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// Slabs of the arena.
    pub slabs: usize,
    /// Sessions that have tokens at once, at most: what all tiers hold. New ones queue beyond it.
    pub live_sessions: usize,
    /// Sessions that compute at once, at most.
    pub seats: usize,
    /// Slabs that are kept free, as far as sessions wait for long enough.
    pub spare_slabs: usize,
    /// Sessions on their way to the device at once, at most: what is on the link cannot be overtaken.
    pub arrivals: usize,
    /// Sessions that are read from disk at once, at most.
    pub reads: usize,
    /// A session that is ready is due after this, if nobody says when.
    pub patience_us: u64,
    /// A session that could not be moved is left alone for this long.
    pub retry_us: u64,
    /// Dirty bytes that count as none: they leave with the slab.
    pub clean_below_bytes: u64,
    /// What things cost.
    pub costs: Costs,
    /// The rules.
    pub policy: Policy,
}
