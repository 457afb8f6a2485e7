//! How many requests may generate or wait to, in all and for one owner.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Error, Limits, Result, keys::Owner};

/// Counts requests; see the module.
#[derive(Debug, Clone, Default)]
pub struct Gate {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    by_owner: HashMap<Owner, usize>,
}

/// The right of one request to be here; given back when it is dropped.
#[derive(Debug)]
pub struct Ticket {
    counts: Arc<Mutex<Counts>>,
    owner: Owner,
}

impl Gate {
    /// Lets a request of `owner` in.
    pub fn enter(&self, owner: &Owner, limits: &Limits) -> Result<Ticket> {
        let mut counts = lock(&self.counts);
        let own = counts.by_owner.get(owner).copied().unwrap_or(0);
        let refused = |what, limit| Error::TooMany { what, limit, retry_s: 1 };
        if own >= limits.queue_per_key {
            return Err(refused("requests of this key", limits.queue_per_key));
        }
        if counts.all >= limits.queue {
            return Err(refused("requests", limits.queue));
        }
        counts.all += 1;
        counts.by_owner.insert(owner.clone(), own + 1);
        Ok(Ticket { counts: Arc::clone(&self.counts), owner: owner.clone() })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        counts.all -= 1;
        if let Some(own) = counts.by_owner.get_mut(&self.owner) {
            *own -= 1;
            if *own == 0 {
                counts.by_owner.remove(&self.owner);
            }
        }
    }
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_cannot_take_what_is_there_for_all() {
        let limits = Limits { queue: 3, queue_per_key: 2, ..Limits::default() };
        let (gate, a, b) = (Gate::default(), Owner::new("a"), Owner::new("b"));
        let first = gate.enter(&a, &limits).unwrap();
        let _second = gate.enter(&a, &limits).unwrap();
        assert!(matches!(gate.enter(&a, &limits), Err(Error::TooMany { limit: 2, .. })));
        let _third = gate.enter(&b, &limits).unwrap();
        assert!(matches!(gate.enter(&b, &limits), Err(Error::TooMany { limit: 3, .. })));
        drop(first);
        assert!(gate.enter(&a, &limits).is_ok());
    }
}
