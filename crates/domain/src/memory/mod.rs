//! In-process doubles: the same promises as the real backends, on a clock that moves only when told.

mod clock;
mod lock;
mod queue;

pub use clock::MemoryClock;
pub use lock::MemoryLock;
pub use queue::MemoryQueue;
