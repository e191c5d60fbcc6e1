//! The suite tried on a backend that is unlike `MemoryLock` in everything: holds are file locks, which live as long
//! as a process and exclude across processes. It shows that the clauses about sessions and processes can pass.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::collections::HashMap;
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use leasehold_conformance::{Abilities, Life, Provider, hold_as_told, lock_conformance, this_test_binary};
use leasehold_domain::{
    AcquireError, Contention, DistributedLock, ExtendError, GuardParts, HeldLock, HoldControl, HolderSession,
    LockGuard, LockId, LockMode, LockName, LockRequest, MemoryClock, Monotonic, MonotonicClock, ReleaseError,
    Released, ResumeError, Ttl, Unavailable,
};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

const FOLDER: &str = "CONFORMANCE_FOLDER";

#[derive(Debug)]
struct Uptime(Instant);

impl MonotonicClock for Uptime {
    fn now(&self) -> Monotonic {
        Monotonic::from_start(self.0.elapsed())
    }
}

/// Each hold has the file of its name locked. Whoever wants it locks the name's gate first, and a waiter keeps the
/// gate while it waits: so nobody comes in past a waiting writer.
#[derive(Clone)]
struct FileLock {
    folder: PathBuf,
    state: Arc<Mutex<State>>,
    clock: Arc<Uptime>,
}

#[derive(Default)]
struct State {
    holds: HashMap<LockId, Hold>,
    queues: HashMap<LockName, Arc<tokio::sync::Mutex<()>>>,
}

struct Hold {
    _file: File,
    control: HoldControl,
}

fn path(folder: &Path, name: &LockName, kind: &str) -> PathBuf {
    let hex = name.encoded().bytes().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    });
    // A file name has at most 255 bytes.
    let parts = hex
        .as_bytes()
        .chunks(200)
        .map(|part| str::from_utf8(part).unwrap());
    folder.join(parts.collect::<PathBuf>()).with_extension(kind)
}

impl FileLock {
    fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            state: Arc::default(),
            clock: Arc::new(Uptime(Instant::now())),
        }
    }

    fn open(&self, name: &LockName, kind: &str) -> Result<File, Unavailable> {
        let path = path(&self.folder, name, kind);
        let open = || {
            if !self.folder.is_dir() {
                return Err(std::io::ErrorKind::NotFound.into());
            }
            fs::create_dir_all(path.parent().unwrap())?;
            File::options().create(true).append(true).read(true).open(&path)
        };
        open().map_err(|error| Unavailable::because(format!("{} cannot be opened", path.display()), error))
    }

    /// Locks `file` unless somebody else has it.
    fn locks(file: &File, mode: LockMode) -> Result<bool, AcquireError> {
        let locked = match mode {
            LockMode::Shared => file.try_lock_shared(),
            LockMode::Exclusive => file.try_lock(),
        };
        match locked {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(AcquireError::Unavailable(Unavailable::because(
                "a file cannot be locked",
                error,
            ))),
        }
    }

    fn contention(&self, name: &LockName) -> Contention {
        let state = self.state.lock().unwrap();
        let mut ours = state.holds.values().map(|hold| hold.control.parts());
        match ours.find(|parts| parts.name == *name) {
            Some(parts) => Contention::with(seen(parts)),
            None => {
                let file = self.open(name, "lock").ok();
                let is_shared = file.is_some_and(|file| file.try_lock_shared().is_ok());
                let mode = if is_shared {
                    LockMode::Shared
                } else {
                    LockMode::Exclusive
                };
                Contention::with(HeldLock {
                    session: Some(HolderSession {
                        backend_pid: 0,
                        application_name: None,
                        client_address: None,
                    }),
                    ..HeldLock::unknown(name.clone(), mode)
                })
            }
        }
    }

    fn grant(&self, request: &LockRequest, file: File) -> LockGuard {
        let lock_id = LockId::new();
        let parts = GuardParts {
            name: request.name().clone(),
            mode: request.mode(),
            lock_id,
            fencing_token: None,
            holder: request.holder().clone(),
            acquired_at: MemoryClock::new().wall(),
            expires_at: None,
            trusted_until: None,
            clock: Arc::clone(&self.clock) as _,
        };
        let state = Arc::clone(&self.state);
        let guard = LockGuard::new(parts, move || {
            state.lock().unwrap().holds.remove(&lock_id);
        });
        let control = guard.control();
        let hold = Hold { _file: file, control };
        self.state.lock().unwrap().holds.insert(lock_id, hold);
        let (state, max_hold) = (Arc::downgrade(&self.state), request.max_hold());
        tokio::spawn(async move {
            sleep(max_hold).await;
            end(&state, |parts| parts.lock_id == lock_id);
        });
        guard
    }
}

/// Ends holds behind the backs of their guards, and tells them.
fn end(state: &Weak<Mutex<State>>, which: impl Fn(&GuardParts) -> bool) {
    if let Some(state) = state.upgrade() {
        let ended = |_: &LockId, hold: &mut Hold| which(hold.control.parts());
        for (_, hold) in state.lock().unwrap().holds.extract_if(ended) {
            hold.control.lose();
        }
    }
}

fn seen(parts: &GuardParts) -> HeldLock {
    HeldLock {
        lock_id: Some(parts.lock_id),
        holder: Some(parts.holder.clone()),
        acquired_at: Some(parts.acquired_at),
        ..HeldLock::unknown(parts.name.clone(), parts.mode)
    }
}

#[async_trait]
impl DistributedLock for FileLock {
    async fn try_acquire(&self, request: &LockRequest) -> Result<LockGuard, AcquireError> {
        request.validate()?;
        let gate = self
            .open(request.name(), "gate")
            .map_err(AcquireError::Unavailable)?;
        let file = self
            .open(request.name(), "lock")
            .map_err(AcquireError::Unavailable)?;
        if Self::locks(&gate, LockMode::Exclusive)? && Self::locks(&file, request.mode())? {
            Ok(self.grant(request, file))
        } else {
            Err(AcquireError::Contended(self.contention(request.name())))
        }
    }

    async fn acquire(&self, request: &LockRequest, wait: Duration) -> Result<LockGuard, AcquireError> {
        request.validate()?;
        let start = tokio::time::Instant::now();
        let queue = Arc::clone(
            self.state
                .lock()
                .unwrap()
                .queues
                .entry(request.name().clone())
                .or_default(),
        );
        let waited = timeout(wait, async {
            let _turn = queue.lock().await;
            let gate = self
                .open(request.name(), "gate")
                .map_err(AcquireError::Unavailable)?;
            while !Self::locks(&gate, LockMode::Exclusive)? {
                sleep(Duration::from_millis(2)).await;
            }
            let file = self
                .open(request.name(), "lock")
                .map_err(AcquireError::Unavailable)?;
            while !Self::locks(&file, request.mode())? {
                sleep(Duration::from_millis(2)).await;
            }
            Ok(self.grant(request, file))
        });
        waited.await.unwrap_or_else(|_| {
            Err(AcquireError::TimedOut {
                waited: start.elapsed(),
                contention: self.contention(request.name()),
            })
        })
    }

    async fn resume(&self, request: &LockRequest, lock_id: LockId) -> Result<LockGuard, ResumeError> {
        request.validate()?;
        Err(ResumeError::NotHeld { lock_id })
    }

    async fn extend(&self, guard: &LockGuard, ttl: Duration) -> Result<(), ExtendError> {
        Ttl::new(ttl)?;
        let held = self.state.lock().unwrap().holds.contains_key(&guard.lock_id());
        held.then_some(()).ok_or(ExtendError::Lost)
    }

    async fn release(&self, guard: LockGuard) -> Result<Released, ReleaseError> {
        let held = self.state.lock().unwrap().holds.remove(&guard.lock_id());
        guard.defuse();
        Ok(held.map_or(Released::AlreadyGone, |_| Released::Held))
    }

    async fn inspect(&self, name: &LockName) -> Result<Option<HeldLock>, Unavailable> {
        let file = self.open(name, "lock")?;
        Ok(match file.try_lock() {
            Ok(()) => None,
            Err(_) => self.contention(name).held.map(|held| *held),
        })
    }
}

struct Files {
    folder: PathBuf,
    made: Mutex<Vec<FileLock>>,
}

impl Files {
    fn new() -> Self {
        let folder = env::temp_dir().join(format!("leasehold-conformance-{}", LockId::new()));
        fs::create_dir(&folder).unwrap();
        let made = Mutex::default();
        Self { folder, made }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).ok();
    }
}

impl Provider for Files {
    fn abilities(&self) -> Abilities {
        Abilities {
            life: Life::Session,
            shared: true,
            processes: true,
        }
    }

    async fn process(&self) -> Arc<dyn DistributedLock> {
        let lock = FileLock::new(&self.folder);
        self.made.lock().unwrap().push(lock.clone());
        Arc::new(lock)
    }

    async fn name(&self, scope: &str, item: &str) -> LockName {
        LockName::new([scope, item]).unwrap()
    }

    async fn residue(&self) -> Option<String> {
        let made = self.made.lock().unwrap();
        let held = made
            .iter()
            .map(|lock| lock.state.lock().unwrap().holds.len())
            .sum::<usize>();
        (held > 0).then(|| format!("{held} holds"))
    }

    async fn lose(&self, name: &LockName) {
        for lock in self.made.lock().unwrap().iter() {
            end(&Arc::downgrade(&lock.state), |parts| parts.name == *name);
        }
    }

    async fn expire(&self, _: &LockName) -> bool {
        false
    }

    fn holder_process(&self) -> Option<Command> {
        let mut command = this_test_binary("file_lock_holder");
        command.env(FOLDER, &self.folder);
        Some(command)
    }

    async fn unreachable(&self) -> Option<Arc<dyn DistributedLock>> {
        Some(Arc::new(FileLock::new(&self.folder.join("never made"))))
    }

    fn secrets(&self) -> Vec<String> {
        vec![self.folder.display().to_string()]
    }
}

#[tokio::test]
#[ignore = "a process for the clauses about processes"]
async fn file_lock_holder() {
    let folder = env::var(FOLDER).unwrap();
    hold_as_told(Arc::new(FileLock::new(Path::new(&folder)))).await;
}

lock_conformance!(Files::new());
