//! The clauses, by what they are about. Each is a promise in one sentence, and the experiment that tests it.

mod basics;

pub use basics::*;
