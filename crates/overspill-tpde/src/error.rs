//! The one error type of the crate: one line that names file, tensor, offset and cause.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::state::StateId;

/// What can go wrong with checkpoints and patches.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Bytes that are not what their format asks for.
    #[error("{}{place}: {cause}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong.
        cause: String,
    },
    /// The base is not the state that the patch starts from.
    #[error("{}: wrong base: its state is {found}, the patch starts from {expected}", path.display())]
    WrongBase {
        /// The base.
        path: PathBuf,
        /// State that the patch names.
        expected: StateId,
        /// State of the base given.
        found: StateId,
    },
    /// Told to end by [`crate::stop`].
    #[error("stopped; nothing was written")]
    Stopped,
    /// The call itself makes no sense, whatever the bytes are.
    #[error("{what}")]
    Misuse {
        /// What does not fit together.
        what: String,
    },
}

/// Where in a file an error was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    /// The tensor, if one is concerned.
    pub tensor: Option<String>,
    /// Byte offset in the file, if one is known.
    pub offset_bytes: Option<u64>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(tensor) = &self.tensor {
            write!(f, ": tensor {tensor:?}")?;
        }
        if let Some(offset) = self.offset_bytes {
            write!(f, ": byte {offset}")?;
        }
        Ok(())
    }
}

impl Error {
    /// A format error about a file as a whole.
    pub(crate) fn format(path: &Path, cause: impl Into<String>) -> Self {
        Error::Format { path: path.to_owned(), place: Place::default(), cause: cause.into() }
    }

    /// A format error at an offset.
    pub(crate) fn at(path: &Path, offset_bytes: u64, cause: impl Into<String>) -> Self {
        let place = Place { tensor: None, offset_bytes: Some(offset_bytes) };
        Error::Format { path: path.to_owned(), place, cause: cause.into() }
    }

    /// A format error about one tensor.
    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        offset_bytes: Option<u64>,
        cause: impl Into<String>,
    ) -> Self {
        let place = Place { tensor: Some(tensor.to_owned()), offset_bytes };
        Error::Format { path: path.to_owned(), place, cause: cause.into() }
    }

    /// Adapter for `map_err` on I/O.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }

    pub(crate) fn misuse(what: impl Into<String>) -> Self {
        Error::Misuse { what: what.into() }
    }
}
