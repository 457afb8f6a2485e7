//! Who is next: the owner with the fewest running, and of these the one that waited longest for a turn.

use std::collections::{HashMap, VecDeque};

use crate::keys::Owner;

/// A queue for each owner.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// Owners that have something waiting, in the order of their turns.
    turns: VecDeque<Owner>,
    waiting: HashMap<Owner, VecDeque<T>>,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { turns: VecDeque::new(), waiting: HashMap::new() }
    }
}

impl<T> FairQueue<T> {
    /// Adds `item` behind what `owner` has waiting.
    pub fn push(&mut self, owner: Owner, item: T) {
        let queue = self.waiting.entry(owner.clone()).or_default();
        if queue.is_empty() {
            self.turns.push_back(owner);
        }
        queue.push_back(item);
    }

    /// The next one; `running` says how many of an owner's run.
    pub fn pop(&mut self, running: impl Fn(&Owner) -> usize) -> Option<T> {
        let at = (0..self.turns.len()).min_by_key(|&at| running(&self.turns[at]))?;
        let owner = self.turns.remove(at)?;
        let queue = self.waiting.get_mut(&owner)?;
        let item = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&owner);
        } else {
            self.turns.push_back(owner);
        }
        item
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    /// Takes out all for which `goes` is true.
    pub fn take(&mut self, mut goes: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        for queue in self.waiting.values_mut() {
            for item in std::mem::take(queue) {
                if goes(&item) { taken.push(item) } else { queue.push_back(item) }
            }
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
        self.turns.retain(|owner| self.waiting.contains_key(owner));
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_key_does_not_delay_another() {
        let (a, b) = (Owner::new("a"), Owner::new("b"));
        let mut queue = FairQueue::default();
        (0..100).for_each(|i| queue.push(a.clone(), ("a", i)));
        queue.push(b.clone(), ("b", 0));
        queue.push(b.clone(), ("b", 1));
        let order: Vec<_> = (0..5).map(|_| queue.pop(|_| 0).unwrap()).collect();
        assert_eq!(order, [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]);
        queue.push(b.clone(), ("b", 2));
        assert_eq!(queue.pop(|owner| usize::from(*owner == a)), Some(("b", 2)));
        assert_eq!(queue.take(|&(_, i)| i >= 50).len(), 50);
        assert_eq!(queue.len(), 47);
        assert_eq!(std::iter::from_fn(|| queue.pop(|_| 0)).count(), 47);
    }
}
