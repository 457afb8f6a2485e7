//! The progress bar: on standard error, only where a person watches.

use std::io::IsTerminal;
use std::sync::Once;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over bytes that shows itself at the first report and goes when dropped.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    sized: Once,
}

impl Bar {
    /// A bar, invisible if `quiet` or if standard error is no terminal.
    pub fn new(quiet: bool, message: &'static str) -> Self {
        let shown = !quiet && std::io::stderr().is_terminal();
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let template = "{msg} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(message);
        Bar { bar, sized: Once::new() }
    }

    /// What the operations call.
    pub fn report(&self, done_bytes: u64, total_bytes: u64) {
        self.sized.call_once(|| self.bar.set_length(total_bytes));
        self.bar.set_position(done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
