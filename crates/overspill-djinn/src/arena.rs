//! The device's memory for sessions: equal slabs of one reservation.
//!
//! Equal slabs cannot fragment, and a session's addresses stay the same while it is resident. A
//! slab that was given back carries *fences*, per layer the events of whatever still reads or
//! writes it; whoever takes the slab next makes its own stream wait for them, the host never does.

use overspill_device::{DeviceRange, EventRef};

use crate::{Error, Geometry, Result};

/// Per layer, what its next user waits for.
pub(crate) type Fences = Vec<Vec<EventRef>>;

/// The right to one slab. A copy of it that outlives its return is found by its generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    pub(crate) slab: usize,
    generation: u64,
}

impl Seat {
    /// Which slab, counted from the start of the arena.
    #[must_use]
    pub fn slab(&self) -> usize {
        self.slab
    }
}

struct Slab {
    generation: u64,
    fences: Fences,
}

/// See the module.
pub struct Arena {
    range: DeviceRange,
    geometry: Geometry,
    slabs: Vec<Slab>,
    free: Vec<usize>,
}

impl Arena {
    /// As many slabs as `range` holds.
    ///
    /// # Errors
    /// [`Error::Arena`] if that is none.
    pub fn new(range: DeviceRange, geometry: Geometry) -> Result<Self> {
        let slab_bytes = geometry.slab_bytes();
        let count = range.bytes().checked_div(slab_bytes).unwrap_or(0);
        if count == 0 {
            return Err(Error::Arena { arena_bytes: range.bytes(), slab_bytes });
        }
        let slabs = (0..count).map(|_| Slab { generation: 0, fences: no_fences(geometry.layers) }).collect();
        Ok(Self { range, geometry, slabs, free: (0..count).rev().collect() })
    }

    /// Slabs in all.
    #[must_use]
    pub fn slabs(&self) -> usize {
        self.slabs.len()
    }

    /// Slabs that nobody has.
    #[must_use]
    pub fn free_slabs(&self) -> usize {
        self.free.len()
    }

    /// A free slab, with what to wait for before each layer of it is touched.
    pub(crate) fn take(&mut self) -> Option<(Seat, Fences)> {
        let index = self.free.pop()?;
        let slab = &mut self.slabs[index];
        slab.generation += 1;
        let fences = std::mem::replace(&mut slab.fences, no_fences(self.geometry.layers));
        Some((Seat { slab: index, generation: slab.generation }, fences))
    }

    /// Takes a slab back. Its next user waits for `fences`.
    pub(crate) fn give_back(&mut self, seat: &Seat, fences: Fences) -> Result<()> {
        self.check(seat)?;
        let slab = &mut self.slabs[seat.slab];
        slab.generation += 1;
        slab.fences = fences;
        self.free.push(seat.slab);
        Ok(())
    }

    /// A part of the slab of `seat`, as bytes in the slab.
    pub(crate) fn range(&self, seat: &Seat, bytes: std::ops::Range<usize>) -> Result<DeviceRange> {
        self.check(seat)?;
        let start = seat.slab * self.geometry.slab_bytes();
        Ok(self.range.slice(start + bytes.start..start + bytes.end)?)
    }

    fn check(&self, seat: &Seat) -> Result<()> {
        let found = self.slabs[seat.slab].generation;
        if found == seat.generation {
            Ok(())
        } else {
            Err(Error::StaleSeat { slab: seat.slab, expected: seat.generation, found })
        }
    }
}

pub(crate) fn no_fences(layers: usize) -> Fences {
    vec![Vec::new(); layers]
}

#[cfg(test)]
mod tests {
    use overspill_device::{Device, sim::SimDevice};

    use super::*;

    const SHAPE: Geometry = Geometry { layers: 2, tokens: 4, token_bytes: 128 };

    #[test]
    fn a_seat_that_was_given_back_is_worth_nothing() {
        let range = SimDevice::threads().alloc_device(3 * SHAPE.slab_bytes()).expect("memory");
        let mut arena = Arena::new(range, SHAPE).expect("three slabs");
        let (seat, _) = arena.take().expect("free");
        arena.give_back(&seat, no_fences(2)).expect("mine");
        assert!(matches!(arena.give_back(&seat, no_fences(2)), Err(Error::StaleSeat { .. })));
        let (again, _) = arena.take().expect("free");
        assert_eq!(again.slab(), seat.slab());
        assert!(matches!(arena.range(&seat, 0..1), Err(Error::StaleSeat { .. })));
        assert_eq!(arena.free_slabs(), 2);
    }

    #[test]
    fn an_arena_without_room_for_one_session_is_refused() {
        let range = SimDevice::threads().alloc_device(SHAPE.slab_bytes() - 1).expect("memory");
        assert!(matches!(Arena::new(range, SHAPE), Err(Error::Arena { .. })));
    }
}
