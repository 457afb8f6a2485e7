//! The one error type of the crate.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// What can go wrong with a chain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A checkpoint or a patch is at fault, or could not be read or written.
    #[error(transparent)]
    Tpde(#[from] overspill_tpde::Error),
    /// The folder is no chain, or one of a later version.
    #[error("{}: {cause}", path.display())]
    NotAChain {
        /// The folder.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// A record or an object is not what was written.
    #[error("{}: damaged: {cause}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// Another process writes to the chain now.
    #[error("{}: written to by {holder}; the lock ends with that process, no file has to be removed", path.display())]
    Locked {
        /// The chain.
        path: PathBuf,
        /// Process and time, as it left them in the lock.
        holder: String,
    },
    /// No such step.
    #[error("step {step} is not in the chain, which {}", held(steps))]
    NoStep {
        /// The step asked for.
        step: u64,
        /// Steps that there are, in order.
        steps: Vec<u64>,
    },
    /// The call makes no sense.
    #[error("{what}")]
    Misuse {
        /// What does not fit together.
        what: String,
    },
}

/// How a chain's steps are named in an error.
fn held(steps: &[u64]) -> String {
    match steps {
        [] => "is empty".to_owned(),
        [only] => format!("holds step {only}"),
        [first, .., last] => format!("holds {} steps from {first} to {last}", steps.len()),
    }
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }

    pub(crate) fn damaged(path: &Path, cause: impl Into<String>) -> Self {
        Error::Damaged { path: path.to_owned(), cause: cause.into() }
    }

    pub(crate) fn misuse(what: impl Into<String>) -> Self {
        Error::Misuse { what: what.into() }
    }
}
