//! The table's decisions, without a server.

use super::*;

const KEY: AdvisoryKey = AdvisoryKey::Big(7);
const FIRST: Session = Session {
    number: 1,
    backend_pid: 1001,
};

/// A table, and what it sends.
struct Bench {
    table: Table,
    sent: mpsc::UnboundedReceiver<Command>,
    wanted: bool,
}

struct Joined {
    lock_id: LockId,
    verdict: oneshot::Receiver<Verdict>,
}

impl Joined {
    fn is_granted(&mut self) -> bool {
        matches!(self.verdict.try_recv(), Ok(Verdict::Granted { .. }))
    }

    fn is_refused(&mut self) -> bool {
        matches!(self.verdict.try_recv(), Ok(Verdict::Refused(_)))
    }

    fn is_waiting(&mut self) -> bool {
        matches!(self.verdict.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }
}

impl Bench {
    fn new() -> Self {
        let (commands, sent) = mpsc::unbounded_channel();
        Self {
            table: Table::new(commands, Budget::new(3), Arc::new(Bounds::new())),
            sent,
            wanted: false,
        }
    }

    fn join(&mut self, mode: LockMode, patience: Patience) -> Joined {
        let (told, verdict) = oneshot::channel();
        let lock_id = LockId::new();
        let waiter = Waiter {
            lock_id,
            name: LockName::new(["a"]).unwrap(),
            mode,
            holder: Arc::new(Holder::new("owner", "operation")),
            max_hold: Duration::from_secs(60),
            patience,
            verdict: told,
        };
        let wanted = self.wanted;
        self.table.join(KEY, waiter, || wanted);
        Joined { lock_id, verdict }
    }

    fn exclusive(&mut self) -> Joined {
        self.join(LockMode::Exclusive, Patience::Wait)
    }

    fn shared(&mut self) -> Joined {
        self.join(LockMode::Shared, Patience::Wait)
    }

    fn leave(&mut self, joined: &Joined) -> Left {
        let wanted = self.wanted;
        self.table.leave(KEY, joined.lock_id, || wanted, None)
    }

    fn grant(&mut self) {
        self.table.granted(KEY, FIRST, DateTime::UNIX_EPOCH);
    }

    /// What was sent, in short: `X`, `S` to lock, `x`, `s` to unlock.
    fn sent(&mut self) -> String {
        let mut sent = String::new();
        while let Ok(command) = self.sent.try_recv() {
            sent.push(match command {
                Command::Lock {
                    mode: LockMode::Exclusive,
                    ..
                } => 'X',
                Command::Lock { .. } => 'S',
                Command::Unlock {
                    mode: LockMode::Exclusive,
                    ..
                } => 'x',
                Command::Unlock { .. } => 's',
                Command::Ping { .. } => 'p',
            });
        }
        sent
    }
}

#[test]
fn the_server_is_not_asked_about_what_is_here() {
    let mut bench = Bench::new();
    let mut first = bench.exclusive();
    assert_eq!(bench.sent(), "X");
    bench.grant();
    assert!(first.is_granted());
    let mut second = bench.join(LockMode::Exclusive, Patience::Try);
    assert!(second.is_refused());
    let mut third = bench.exclusive();
    assert!(third.is_waiting());
    assert_eq!(bench.leave(&first), Left::Kept);
    assert!(third.is_granted());
    assert_eq!(bench.sent(), "");
    assert_eq!(bench.leave(&third), Left::Unlocking);
    assert_eq!(bench.leave(&third), Left::NotHeld);
    assert_eq!(bench.sent(), "x");
    assert!(bench.table.entries.is_empty());
}

#[test]
fn after_sixteen_times_it_is_unlocked_and_asked_for_again() {
    let mut bench = Bench::new();
    let mut waiting = VecDeque::from_iter((0..40).map(|_| bench.exclusive()));
    bench.grant();
    assert_eq!(bench.sent(), "X");
    for _ in 0..2 {
        for _ in 0..HANDED_ON_AT_MOST {
            let mut holder = waiting.pop_front().unwrap();
            assert!(holder.is_granted());
            assert_eq!(bench.leave(&holder), Left::Kept);
        }
        assert_eq!(bench.sent(), "");
        let mut last = waiting.pop_front().unwrap();
        assert!(last.is_granted());
        assert_eq!(bench.leave(&last), Left::Unlocking);
        assert_eq!(bench.sent(), "xX");
        assert!(waiting[0].is_waiting());
        bench.grant();
    }
}

#[test]
fn others_have_their_turn_before_it_is_asked_for_again() {
    let mut bench = Bench::new();
    let first = bench.exclusive();
    let mut second = bench.exclusive();
    bench.grant();
    bench.wanted = true;
    assert_eq!(bench.leave(&first), Left::Unlocking);
    assert_eq!(bench.sent(), "Xx");
    let chaser = bench.table.unlocked(KEY).expect("somebody must end their turn");
    assert!(bench.join(LockMode::Exclusive, Patience::Try).is_refused());
    assert!(matches!(
        bench.table.chase(KEY, &chaser),
        Chase::Yielding { awaited: true, .. }
    ));
    assert_eq!(bench.sent(), "");
    bench.table.ask_again(KEY);
    assert_eq!(bench.sent(), "X");
    bench.grant();
    assert!(second.is_granted());
    assert_eq!(bench.table.chase(KEY, &chaser), Chase::End);
}

/// Shared holders that overlap for ever would keep the server's lock for ever.
#[test]
fn generations_of_shared_holders_are_counted() {
    let mut bench = Bench::new();
    let mut holder = bench.shared();
    bench.grant();
    for _ in 0..HANDED_ON_AT_MOST {
        let mut next = bench.shared();
        assert!(next.is_granted());
        let mut beside = bench.join(LockMode::Shared, Patience::Try);
        assert!(beside.is_granted());
        assert_eq!(bench.leave(&beside), Left::Kept);
        assert_eq!(bench.leave(&holder), Left::Kept);
        holder = next;
    }
    let mut late = bench.shared();
    assert!(late.is_waiting());
    assert!(bench.join(LockMode::Shared, Patience::Try).is_refused());
    assert_eq!(bench.leave(&holder), Left::Unlocking);
    assert_eq!(bench.sent(), "SsS");
    bench.grant();
    assert!(late.is_granted());
}

#[test]
fn no_shared_holder_comes_in_before_whoever_waits() {
    let mut bench = Bench::new();
    let reader = bench.shared();
    bench.grant();
    let writer = bench.exclusive();
    let mut late = bench.shared();
    assert!(late.is_waiting());
    bench.table.withdraw(KEY, writer.lock_id, || false);
    assert!(late.is_granted(), "the writer gave up");
    bench.wanted = true;
    let mut later = bench.shared();
    assert!(later.is_waiting(), "another process waits");
    assert_eq!(bench.leave(&reader), Left::Kept);
    assert_eq!(bench.leave(&late), Left::Unlocking);
    assert_eq!(bench.sent(), "Ss");
}

#[test]
fn what_nobody_wants_any_more_goes_back() {
    let mut bench = Bench::new();
    let gone = bench.exclusive();
    bench.table.withdraw(KEY, gone.lock_id, || false);
    let mut other = bench.shared();
    bench.grant();
    assert_eq!(bench.sent(), "XxS");
    bench.grant();
    assert!(other.is_granted());
    bench.table.withdraw(KEY, other.lock_id, || false);
    assert_eq!(bench.sent(), "s");
    assert!(bench.table.entries.is_empty());
}

#[test]
fn a_refused_writer_says_nothing_about_readers() {
    let mut bench = Bench::new();
    let mut writer = bench.join(LockMode::Exclusive, Patience::Try);
    let mut reader = bench.join(LockMode::Shared, Patience::Try);
    assert!(bench.table.refused(KEY).is_none());
    assert!(writer.is_refused());
    assert_eq!(bench.sent(), "XS");
    let mut writer = bench.exclusive();
    bench.grant();
    assert!(reader.is_granted());
    assert_eq!(bench.leave(&reader), Left::Unlocking);
    let mut reader = bench.join(LockMode::Shared, Patience::Try);
    assert!(bench.table.refused(KEY).is_some(), "the writer waits");
    assert!(reader.is_refused(), "the writer is before it");
    assert!(writer.is_waiting());
}

#[test]
fn holders_are_lost_with_their_session_and_waiters_are_not() {
    let mut bench = Bench::new();
    let holder = bench.exclusive();
    let mut waiter = bench.exclusive();
    bench.grant();
    let other = Session { number: 2, ..FIRST };
    assert_eq!(bench.table.session_ended(other), []);
    assert_eq!(bench.table.session_ended(FIRST), [(KEY, holder.lock_id)]);
    assert_eq!(bench.leave(&holder), Left::NotHeld);
    assert_eq!(bench.sent(), "XX");
    let cause = Unavailable::new("broken");
    let broken = Failure { cause, sent: true };
    bench.table.failed(KEY, &broken);
    assert_eq!(bench.sent(), "X", "once more");
    assert!(waiter.is_waiting());
    bench.table.failed(KEY, &broken);
    assert!(matches!(waiter.verdict.try_recv(), Ok(Verdict::Failed(_))));
    assert!(bench.table.entries.is_empty());
}
