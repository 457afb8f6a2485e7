//! What can go wrong below the engine, with the facts a caller needs to say so.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a device, a stream or a piece of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An allocation on a tier failed.
    #[error("{tier}: cannot allocate {requested_bytes} bytes, {available_bytes} bytes are available")]
    OutOfMemory {
        /// "device" or "host".
        tier: &'static str,
        /// What was asked for.
        requested_bytes: usize,
        /// What the backend says is left; 0 where it cannot say.
        available_bytes: usize,
    },
    /// A range does not lie inside the memory it is taken from, or is taken already.
    #[error("range {start}..{end} of {bytes} bytes is {what}")]
    BadRange {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Size of the memory that the range was asked of.
        bytes: usize,
        /// "out of bounds", "claimed already", ...
        what: &'static str,
    },
    /// Source and destination of a copy differ in size.
    #[error("copy of {src_bytes} bytes into {dst_bytes} bytes")]
    SizeMismatch {
        /// Bytes of the source.
        src_bytes: usize,
        /// Bytes of the destination.
        dst_bytes: usize,
    },
    /// The backend is not there: no library, no device, a driver too old.
    #[error("{backend}: {reason}")]
    Unavailable {
        /// "cuda", "nvrtc".
        backend: &'static str,
        /// What is missing and what to do.
        reason: String,
    },
    /// The driver refused a call.
    #[error("{call}: {message} (code {code})")]
    Driver {
        /// Name of the call.
        call: &'static str,
        /// The driver's number for it.
        code: i32,
        /// The driver's words for it.
        message: String,
    },
    /// A kernel does not compile.
    #[error("{source_name} for sm_{compute_capability}: {log}")]
    Compile {
        /// File name of the source.
        source_name: &'static str,
        /// As 10 * major + minor.
        compute_capability: u32,
        /// The compiler's words.
        log: String,
    },
    /// A stream was told to wait for an event of another backend.
    #[error("{backend}: the event is of another backend")]
    ForeignEvent {
        /// The stream's backend.
        backend: &'static str,
    },
    /// On a seeded device nothing can run any more: whoever waits would wait forever.
    #[error("deadlock on the simulated device, seed {seed}")]
    Deadlock {
        /// Seed of the schedule.
        seed: u64,
    },
    /// A fault that a test asked for.
    #[error("injected fault: {0}")]
    Injected(&'static str),
}
