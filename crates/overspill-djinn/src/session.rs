//! The state of a session: execution x residency x a watermark per layer. Pure.
//!
//! The combinations that must not be have no value: a session that runs has a seat; one that is
//! away has no dirty token, since [`Session::leave`] refuses while there is one; a watermark never
//! passes what was written. A transition that is refused changes nothing.

use std::fmt;

/// Tokens of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// Written on the device.
    pub written: usize,
    /// Of these, in the host copy as well, from the first one on.
    pub clean: usize,
}

/// Where the keys and values of a session are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// On the device.
    Resident,
    /// In the host copy alone (host memory, disk, or some in each).
    Away,
}

/// Why a transition is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It computes.
    Running,
    /// It does not compute.
    NotRunning,
    /// It is not on the device.
    Away,
    /// It is on the device already.
    Resident,
    /// Tokens of it are on the device alone.
    Dirty,
    /// A layer would shrink, or have more clean tokens than tokens.
    Backwards,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "is running",
            Self::NotRunning => "is not running",
            Self::Away => "is not on the device",
            Self::Resident => "is on the device",
            Self::Dirty => "has tokens that are on the device alone",
            Self::Backwards => "cannot have fewer tokens than it had",
        })
    }
}

/// See the module. `S` is the right to a slab.
#[derive(Debug)]
pub struct Session<S> {
    stage: Stage<S>,
}

#[derive(Debug)]
enum Stage<S> {
    Running(Seated<S>),
    /// `pause` is the last layer that was run, if the session stands within a forward.
    Parked {
        pause: Option<usize>,
        place: Place<S>,
    },
}

#[derive(Debug)]
enum Place<S> {
    Seated(Seated<S>),
    /// Tokens per layer, all of them in the host copy.
    Away(Vec<usize>),
}

#[derive(Debug)]
struct Seated<S> {
    seat: S,
    marks: Vec<Mark>,
}

type Outcome<T> = Result<T, Refusal>;

impl<S> Session<S> {
    /// A session whose tokens per layer are all in its host copy; a new one has none.
    #[must_use]
    pub fn away(tokens: Vec<usize>, pause: Option<usize>) -> Self {
        Self { stage: Stage::Parked { pause, place: Place::Away(tokens) } }
    }

    /// Takes a seat; its tokens are on their way to it.
    pub fn arrive(&mut self, seat: S) -> Outcome<()> {
        match &mut self.stage {
            Stage::Parked { place: place @ Place::Away(_), .. } => {
                let Place::Away(tokens) = place else { return Err(Refusal::Resident) };
                let marks = tokens.iter().map(|&n| Mark { written: n, clean: n }).collect();
                *place = Place::Seated(Seated { seat, marks });
                Ok(())
            }
            _ => Err(Refusal::Resident),
        }
    }

    /// Starts or resumes a forward; the layer after which it was paused, if it was.
    pub fn begin(&mut self) -> Outcome<Option<usize>> {
        match &self.stage {
            Stage::Running(_) => return Err(Refusal::Running),
            Stage::Parked { place: Place::Away(_), .. } => return Err(Refusal::Away),
            Stage::Parked { place: Place::Seated(_), .. } => {}
        }
        let parked = std::mem::replace(&mut self.stage, Self::away(Vec::new(), None).stage);
        let Stage::Parked { pause, place: Place::Seated(seated) } = parked else { return Err(Refusal::Away) };
        self.stage = Stage::Running(seated);
        Ok(pause)
    }

    /// Ends a forward, or stands still after a layer of it.
    pub fn park(&mut self, pause: Option<usize>) -> Outcome<()> {
        if !self.is_running() {
            return Err(Refusal::NotRunning);
        }
        let running = std::mem::replace(&mut self.stage, Self::away(Vec::new(), None).stage);
        let Stage::Running(seated) = running else { return Err(Refusal::NotRunning) };
        self.stage = Stage::Parked { pause, place: Place::Seated(seated) };
        Ok(())
    }

    /// A layer has `tokens` now; its mark.
    pub fn wrote(&mut self, layer: usize, tokens: usize) -> Outcome<Mark> {
        let Stage::Running(seated) = &mut self.stage else { return Err(Refusal::NotRunning) };
        let mark = seated.marks.get_mut(layer).ok_or(Refusal::Backwards)?;
        if tokens < mark.written {
            return Err(Refusal::Backwards);
        }
        mark.written = tokens;
        Ok(*mark)
    }

    /// Forgets what each layer has beyond `tokens`.
    pub fn rewind(&mut self, tokens: &[usize]) -> Outcome<()> {
        let marks = &mut self.seated_mut()?.marks;
        if marks.len() != tokens.len() {
            return Err(Refusal::Backwards);
        }
        for (mark, &tokens) in marks.iter_mut().zip(tokens) {
            mark.written = mark.written.min(tokens);
            mark.clean = mark.clean.min(tokens);
        }
        Ok(())
    }

    /// The host copy of a layer has `tokens` now.
    pub fn cleaned(&mut self, layer: usize, tokens: usize) -> Outcome<()> {
        let mark = self.seated_mut()?.marks.get_mut(layer).ok_or(Refusal::Backwards)?;
        if tokens > mark.written || tokens < mark.clean {
            return Err(Refusal::Backwards);
        }
        mark.clean = tokens;
        Ok(())
    }

    /// The host copy of a resident session is gone.
    pub fn host_copy_dropped(&mut self) -> Outcome<()> {
        for mark in &mut self.seated_mut()?.marks {
            mark.clean = 0;
        }
        Ok(())
    }

    /// Gives the seat up: all tokens are in the host copy.
    pub fn leave(&mut self) -> Outcome<S> {
        let Stage::Parked { place, .. } = &mut self.stage else { return Err(Refusal::Running) };
        let Place::Seated(seated) = &*place else { return Err(Refusal::Away) };
        if seated.marks.iter().any(|mark| mark.clean < mark.written) {
            return Err(Refusal::Dirty);
        }
        let tokens = seated.marks.iter().map(|mark| mark.written).collect();
        match std::mem::replace(place, Place::Away(tokens)) {
            Place::Seated(seated) => Ok(seated.seat),
            Place::Away(_) => Err(Refusal::Away),
        }
    }

    /// Ends the session; its seat, if it had one. Refused while it runs.
    pub fn end(self) -> Result<Option<S>, (Self, Refusal)> {
        match self.stage {
            Stage::Running(_) => Err((self, Refusal::Running)),
            Stage::Parked { place: Place::Seated(seated), .. } => Ok(Some(seated.seat)),
            Stage::Parked { place: Place::Away(_), .. } => Ok(None),
        }
    }

    /// Whether it computes.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.stage, Stage::Running(_))
    }

    /// The layer after which it stands within a forward.
    #[must_use]
    pub fn pause(&self) -> Option<usize> {
        match self.stage {
            Stage::Running(_) => None,
            Stage::Parked { pause, .. } => pause,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn residency(&self) -> Residency {
        match self.stage {
            Stage::Parked { place: Place::Away(_), .. } => Residency::Away,
            _ => Residency::Resident,
        }
    }

    /// Its seat.
    pub fn seat(&self) -> Outcome<&S> {
        self.seated().map(|seated| &seated.seat)
    }

    /// Tokens of each layer.
    #[must_use]
    pub fn tokens(&self) -> Vec<usize> {
        match &self.stage {
            Stage::Parked { place: Place::Away(tokens), .. } => tokens.clone(),
            _ => self
                .seated()
                .map_or_else(|_| Vec::new(), |s| s.marks.iter().map(|mark| mark.written).collect()),
        }
    }

    /// Per layer, the tokens that are on the device alone.
    pub fn dirty(&self) -> Outcome<Vec<std::ops::Range<usize>>> {
        Ok(self.seated()?.marks.iter().map(|mark| mark.clean..mark.written).collect())
    }

    /// Tokens of all layers together, written and of these clean, and the most that a layer has.
    #[must_use]
    pub fn totals(&self) -> (Mark, usize) {
        let add = |(sum, most): (Mark, usize), mark: Mark| {
            let sum = Mark { written: sum.written + mark.written, clean: sum.clean + mark.clean };
            (sum, most.max(mark.written))
        };
        match &self.stage {
            Stage::Running(seated) | Stage::Parked { place: Place::Seated(seated), .. } => {
                seated.marks.iter().copied().fold(Default::default(), add)
            }
            Stage::Parked { place: Place::Away(tokens), .. } => {
                tokens.iter().map(|&n| Mark { written: n, clean: n }).fold(Default::default(), add)
            }
        }
    }

    /// The most tokens that any layer has on the device alone.
    #[must_use]
    pub fn most_dirty(&self) -> usize {
        let marks = self.seated().map(|seated| seated.marks.as_slice()).unwrap_or_default();
        marks.iter().map(|mark| mark.written - mark.clean).max().unwrap_or(0)
    }

    fn seated(&self) -> Outcome<&Seated<S>> {
        match &self.stage {
            Stage::Running(seated) | Stage::Parked { place: Place::Seated(seated), .. } => Ok(seated),
            Stage::Parked { place: Place::Away(_), .. } => Err(Refusal::Away),
        }
    }

    fn seated_mut(&mut self) -> Outcome<&mut Seated<S>> {
        match &mut self.stage {
            Stage::Running(seated) | Stage::Parked { place: Place::Seated(seated), .. } => Ok(seated),
            Stage::Parked { place: Place::Away(_), .. } => Err(Refusal::Away),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life() {
        let mut session = Session::away(vec![0, 0], None);
        assert_eq!(session.begin(), Err(Refusal::Away));
        session.arrive("seat").expect("away");
        assert_eq!(session.arrive("second seat"), Err(Refusal::Resident));
        assert_eq!(session.begin(), Ok(None));
        assert_eq!(session.begin(), Err(Refusal::Running));
        session.wrote(0, 5).expect("running");
        assert_eq!(session.wrote(0, 4), Err(Refusal::Backwards));
        assert_eq!(session.wrote(2, 1), Err(Refusal::Backwards));
        assert_eq!(session.cleaned(0, 6), Err(Refusal::Backwards));
        session.park(Some(0)).expect("running");
        assert_eq!(session.leave(), Err(Refusal::Dirty));
        session.cleaned(0, 5).expect("written");
        assert_eq!(session.leave(), Ok("seat"));
        assert_eq!((session.residency(), session.pause()), (Residency::Away, Some(0)));
        assert_eq!(session.tokens(), [5, 0]);
        session.arrive("other").expect("away");
        session.host_copy_dropped().expect("resident");
        assert_eq!(session.leave(), Err(Refusal::Dirty));
        assert_eq!(session.begin(), Ok(Some(0)));
        assert_eq!(session.leave(), Err(Refusal::Running));
        let (mut session, refusal) = session.end().expect_err("running");
        assert_eq!(refusal, Refusal::Running);
        session.park(None).expect("running");
        assert_eq!(session.park(None), Err(Refusal::NotRunning));
        assert_eq!(session.end().map_err(|(_, refusal)| refusal), Ok(Some("other")));
    }

    /// Every transition in every order: what is away is clean, what runs is resident, and a refusal
    /// changes nothing.
    #[test]
    fn invariants_hold_under_random_transitions() {
        for seed in 0..5000 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut session = Session::away(vec![0; 3], None);
            let mut seats_out = 0;
            for step in 0..40 {
                let before = format!("{session:?}");
                let (layer, tokens) = (rng.usize(..4), rng.usize(..6));
                let outcome = match rng.u8(..9) {
                    0 => session.arrive(step).map(|()| seats_out += 1),
                    1 => session.begin().map(|_| ()),
                    2 => session.park(rng.bool().then_some(layer)),
                    3 => session.wrote(layer, tokens).map(|_| ()),
                    4 | 5 => session.cleaned(layer, tokens),
                    6 => session.host_copy_dropped(),
                    7 => session.rewind(&[tokens; 3]),
                    _ => session.leave().map(|_| seats_out -= 1),
                };
                if outcome.is_err() {
                    assert_eq!(
                        before,
                        format!("{session:?}"),
                        "seed {seed}, step {step}: a refusal changed it"
                    );
                }
                assert_eq!(seats_out, i32::from(session.residency() == Residency::Resident), "seed {seed}");
                assert!(!session.is_running() || session.residency() == Residency::Resident, "seed {seed}");
                for dirty in session.dirty().unwrap_or_default() {
                    assert!(dirty.start <= dirty.end, "seed {seed}, step {step}");
                }
            }
        }
    }
}
