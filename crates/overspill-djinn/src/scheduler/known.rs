//! What the scheduler knows of one session, and the queues that follow from it.

use super::{
    config::{Costs, SchedulerConfig, Victim},
    queues::{Keys, Queue},
};

/// Bytes and tokens of a session, as the executor measures them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    /// Tokens that it has, wherever they are.
    pub tokens: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Of these, on the device alone.
    pub dirty_bytes: u64,
    /// Of the host copy, in host memory.
    pub host_bytes: u64,
    /// Of the host copy, on disk.
    pub disk_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// For something outside; it is expected at `next_us`, because it said so or by guess.
    Waiting {
        since_us: u64,
        next_us: u64,
        is_told: bool,
    },
    /// To compute.
    Ready {
        deadline_us: u64,
    },
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Seated,
    /// It has a slab, and its bytes are on their way there.
    Arriving,
    Away,
}

/// A session between host memory and disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moving {
    Writing,
    Reading,
}

#[derive(Debug, Clone)]
pub(super) struct Known {
    pub phase: Phase,
    pub place: Place,
    pub moving: Option<Moving>,
    pub size: Size,
    /// How long before it is due it sets out: twice what its way takes, since another one may be on it.
    pub lead_us: u64,
    /// When it last computed.
    pub last_use_us: u64,
    /// When it took its slab.
    pub seated_us: u64,
    /// How long it uses to wait: an average in which a wait counts half as much as the next one.
    pub habit_us: Option<u64>,
    /// Whether it was brought back ahead of time in this wait: once is enough if it was wrong.
    pub was_foreseen: bool,
    /// Whether it was read from disk ahead of time in this wait.
    pub was_read: bool,
    pub blocked_until_us: Option<u64>,
}

/// Parts of the whole that a session takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally {
    pub slabs: usize,
    pub live: usize,
    pub running: usize,
    pub arriving: usize,
    pub reading: usize,
    pub writing: usize,
}

impl Tally {
    pub fn plus(self, other: Self) -> Self {
        Self {
            slabs: self.slabs + other.slabs,
            live: self.live + other.live,
            running: self.running + other.running,
            arriving: self.arriving + other.arriving,
            reading: self.reading + other.reading,
            writing: self.writing + other.writing,
        }
    }

    pub fn less(self, other: Self) -> Self {
        Self {
            slabs: self.slabs - other.slabs,
            live: self.live - other.live,
            running: self.running - other.running,
            arriving: self.arriving - other.arriving,
            reading: self.reading - other.reading,
            writing: self.writing - other.writing,
        }
    }
}

impl Known {
    pub fn new(now_us: u64) -> Self {
        Self {
            phase: Phase::Waiting { since_us: now_us, next_us: now_us, is_told: false },
            place: Place::Away,
            moving: None,
            size: Size::default(),
            lead_us: 0,
            last_use_us: now_us,
            seated_us: now_us,
            habit_us: None,
            was_foreseen: false,
            was_read: false,
            blocked_until_us: None,
        }
    }

    pub fn tally(&self) -> Tally {
        Tally {
            slabs: usize::from(self.place != Place::Away),
            live: usize::from(self.size.tokens > 0 || self.place != Place::Away),
            running: usize::from(self.phase == Phase::Running),
            arriving: usize::from(self.place == Place::Arriving),
            reading: usize::from(self.moving == Some(Moving::Reading)),
            writing: usize::from(self.moving == Some(Moving::Writing)),
        }
    }

    /// Takes a place on the device.
    pub fn sit(&mut self, now_us: u64, place: Place) {
        if self.place == Place::Away {
            self.seated_us = now_us;
        }
        self.place = place;
    }

    /// Computes from now on.
    pub fn start(&mut self, now_us: u64) {
        self.learn(now_us);
        self.place = Place::Seated;
        self.phase = Phase::Running;
        self.last_use_us = now_us;
    }

    /// A wait is over: the next one is expected to be like it.
    pub fn learn(&mut self, now_us: u64) {
        if let (Phase::Waiting { since_us, .. }, true) = (self.phase, self.size.tokens > 0) {
            let waited_us = now_us.saturating_sub(since_us);
            self.habit_us = Some(self.habit_us.map_or(waited_us, |habit_us| habit_us.midpoint(waited_us)));
        }
    }

    /// How long it waits if it does not say: as it uses to, and before it has a habit as long as its way
    /// back takes, so that the one that has waited longest is soon the one expected last.
    pub fn guess_us(&self, config: &SchedulerConfig) -> u64 {
        let way_us = self.size.bytes as f64 * config.costs.in_us_per_byte;
        self.habit_us.unwrap_or(way_us.ceil() as u64)
    }

    /// Its bytes are counted anew.
    pub fn measure(&mut self, size: Size, costs: &Costs) {
        self.size = size;
        let link_us = self.return_bytes() as f64 * costs.in_us_per_byte;
        let disk_us = size.disk_bytes as f64 * costs.read_us_per_byte;
        self.lead_us = (2.0 * (link_us + disk_us)).ceil() as u64;
    }

    /// Bytes that cross the link when it comes back.
    pub fn return_bytes(&self) -> u64 {
        self.size.host_bytes + self.size.disk_bytes
    }

    /// The queues that it belongs in.
    pub fn keys(&self, config: &SchedulerConfig) -> Keys {
        let mut keys = Keys::default();
        let is_free = self.blocked_until_us.is_none() && self.moving.is_none();
        if let Some(until_us) = self.blocked_until_us {
            keys.put(Queue::Blocked, until_us);
        }
        match (self.phase, self.place) {
            (Phase::Running, _) => {}
            (Phase::Ready { deadline_us }, Place::Seated) => keys.put(Queue::Run, deadline_us),
            (Phase::Ready { deadline_us }, Place::Arriving) => keys.put(Queue::Coming, deadline_us),
            (Phase::Ready { deadline_us }, Place::Away) if is_free => {
                let queue = match self.size {
                    Size { tokens: 0, .. } => Queue::New,
                    Size { disk_bytes: 1.., .. } => Queue::WantedDisk,
                    _ => Queue::Wanted,
                };
                keys.put(queue, deadline_us);
            }
            (Phase::Ready { .. }, Place::Away) => {}
            (Phase::Waiting { next_us, .. }, place) => {
                if config.policy.victim == Victim::NextUse {
                    keys.put(Queue::Expected, next_us);
                }
                match (place, self.victim_key(config, next_us)) {
                    (Place::Seated, Some(key)) if is_free => {
                        let is_clean = self.size.dirty_bytes <= config.clean_below_bytes;
                        keys.put(if is_clean { Queue::Clean } else { Queue::Dirty }, key);
                    }
                    (Place::Arriving, Some(key)) => keys.put(Queue::Landing, key),
                    (Place::Away, key) if is_free => self.put_away(config, next_us, key, &mut keys),
                    _ => {}
                }
            }
        }
        if self.place == Place::Seated && self.size.host_bytes > 0 {
            // Who computes makes new tokens anyway; of the others, who is needed soonest stays longest.
            let key = match self.phase {
                Phase::Running => 0,
                Phase::Ready { .. } => 1,
                Phase::Waiting { next_us, .. } => self.victim_key(config, next_us).unwrap_or(2).max(2),
            };
            keys.put(Queue::Copies, key);
        }
        keys
    }

    fn put_away(&self, config: &SchedulerConfig, next_us: u64, key: Option<u64>, keys: &mut Keys) {
        if let (Some(key), true) = (key, self.size.host_bytes > 0) {
            keys.put(Queue::Away, key);
        }
        if !config.policy.foresees || self.return_bytes() == 0 {
            return;
        }
        let start_us = next_us.saturating_sub(self.lead_us);
        if self.size.disk_bytes == 0 && !self.was_foreseen {
            keys.put(Queue::Due, start_us);
        } else if self.size.disk_bytes > 0 && !self.was_read {
            keys.put(Queue::DueDisk, start_us);
        }
    }

    /// Who has the highest leaves first.
    fn victim_key(&self, config: &SchedulerConfig, next_us: u64) -> Option<u64> {
        match config.policy.victim {
            Victim::NextUse => Some(next_us),
            Victim::LastUse => Some(u64::MAX - self.last_use_us),
            Victim::FirstIn => Some(u64::MAX - self.seated_us),
            Victim::Nobody => None,
        }
    }
}
