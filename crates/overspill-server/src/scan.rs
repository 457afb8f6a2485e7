//! Finds stop strings in text that comes in pieces, and holds back what may be the start of one.

use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scanner {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Text that no stop string can reach back into any more.
    pub text: String,
    /// What came after a stop string, if one was found.
    pub after: Option<String>,
}

impl Scanner {
    /// For these strings, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Adds a piece. Of several stop strings the one that ends first counts, wherever pieces end.
    pub fn push(&mut self, piece: &str) -> Found {
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| place(&self.held, stop)).min();
        if let Some((end, at)) = first {
            let after = self.held.split_off(end);
            self.held.truncate(at);
            return Found { text: std::mem::take(&mut self.held), after: Some(after) };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        Found { text: std::mem::replace(&mut self.held, held), after: None }
    }

    /// What was held back, at the end.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where `stop` first ends and starts in `text`.
fn place(text: &str, stop: &str) -> Option<(usize, usize)> {
    text.find(stop).map(|at| (at + stop.len(), at))
}

/// Bytes at the end of `text` that `stop` starts with, less than all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(at, _)| at).rev();
    starts.into_iter().find(|&at| text.ends_with(&stop[..at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same by looking at the whole text at once.
    fn reference(stops: &[String], text: &str) -> (String, bool) {
        match stops.iter().filter_map(|stop| place(text, stop)).min() {
            Some((_, at)) => (text[..at].to_owned(), true),
            None => (text.to_owned(), false),
        }
    }

    #[test]
    fn pieces_give_what_the_whole_text_gives() {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let mut word = |longest: usize| -> String {
                let length = random.usize(1..=longest);
                (0..length).map(|_| ['a', 'b', 'é'][random.usize(0..3)]).collect()
            };
            let stops: Vec<String> = (0..2).map(|_| word(4)).collect();
            let pieces: Vec<String> = (0..6).map(|_| word(4)).collect();
            let (expected, hits) = reference(&stops, &pieces.concat());
            let (mut scanner, mut text, mut hit) = (Scanner::new(stops.clone()), String::new(), false);
            for piece in &pieces {
                let found = scanner.push(piece);
                text.push_str(&found.text);
                // What was given out never has to be taken back.
                assert!(expected.starts_with(&text), "seed {seed}: {stops:?} in {pieces:?}");
                if found.after.is_some() {
                    hit = true;
                    break;
                }
            }
            if !hit {
                text.push_str(&scanner.flush());
            }
            assert_eq!((text, hit), (expected, hits), "seed {seed}: {stops:?} in {pieces:?}");
        }
    }
}
