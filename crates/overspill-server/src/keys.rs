//! API keys, and who a request is from.

use axum::http::{HeaderMap, header};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Whose a session is: the first half of a key's hash, so that it outlives the process and tells nobody the key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Owner(String);

impl Owner {
    /// An owner of this name.
    pub fn new(name: &str) -> Self {
        Self(name.to_owned())
    }
}

/// The keys that are let in.
#[derive(Debug)]
pub struct Keys(Vec<(blake3::Hash, Owner)>);

impl Keys {
    /// Of these keys; none: everybody is let in, as one owner.
    pub fn new(keys: &[String]) -> Self {
        let entry = |key: &String| {
            let hash = blake3::hash(key.as_bytes());
            (hash, Owner(hash.to_hex()[..32].to_owned()))
        };
        Self(keys.iter().map(entry).collect())
    }

    /// Whether nobody needs a key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose key is in `headers`. What is compared are hashes, in constant time, and all of them.
    pub fn owner(&self, headers: &HeaderMap) -> Result<Owner> {
        if self.is_empty() {
            return Ok(Owner::new("local"));
        }
        let value = headers.get(header::AUTHORIZATION).ok_or(Error::Key)?.as_bytes();
        let (scheme, key) = value.split_at_checked(7).ok_or(Error::Key)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return Err(Error::Key);
        }
        let found = blake3::hash(key);
        // `blake3::Hash` compares in constant time; no early end tells which key it was.
        let matching =
            self.0.iter().fold(None, |last, (hash, owner)| if *hash == found { Some(owner) } else { last });
        matching.cloned().ok_or(Error::Key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(keys: &Keys, value: &str) -> Result<Owner> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        keys.owner(&headers)
    }

    #[test]
    fn only_whole_keys_are_let_in() {
        let keys = Keys::new(&["alpha".to_owned(), "beta".to_owned()]);
        let alpha = owner(&keys, "Bearer alpha").unwrap();
        assert_eq!(alpha, owner(&keys, "bearer alpha").unwrap());
        assert_ne!(alpha, owner(&keys, "Bearer beta").unwrap());
        for wrong in ["Bearer alph", "Bearer alphaa", "Bearer ", "Bearer", "Basic alpha", "", "alpha"] {
            assert!(owner(&keys, wrong).is_err(), "{wrong:?} was let in");
        }
        assert!(keys.owner(&HeaderMap::new()).is_err());
        assert!(Keys::new(&[]).owner(&HeaderMap::new()).is_ok());
    }
}
