// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Every call in every state, with a backend that notes what reaches it and fails on demand.

use core::cell::{Cell, RefCell};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::vec::Vec;

use super::*;

std::thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
    static NOW: Cell<u64> = const { Cell::new(0) };
}

fn on_cpu(cpu: usize) {
    CPU.set(cpu);
}

fn pass(ns: u64) {
    NOW.set(NOW.get() + ns);
}

struct Host;

impl AxVCpuHal for Host {
    fn alloc_frames(_order: u32) -> Option<HostPhysAddr> {
        None
    }
    fn free_frames(_addr: HostPhysAddr, _order: u32) {}
    fn phys_to_virt(_addr: HostPhysAddr) -> *mut u8 {
        core::ptr::null_mut()
    }
    fn now_ns() -> u64 {
        NOW.get()
    }
    fn cpu_id() -> usize {
        CPU.get()
    }
    fn fpu_begin() {}
    fn fpu_end() {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    New,
    SetEntry(u64),
    SetRoot(u64),
    Setup(u32),
    Bind,
    Run,
    Unbind,
    SetGpr(usize, usize),
}

/// What the test and the backend share.
#[derive(Default)]
struct Script {
    calls: RefCell<Vec<Call>>,
    /// The error of the next call.
    fail: Cell<Option<AxError>>,
    panic_in_run: Cell<bool>,
}

impl Script {
    fn note(&self, call: Call) -> AxResult {
        self.calls.borrow_mut().push(call);
        self.fail.take().map_or(Ok(()), Err)
    }
}

struct Mock(Rc<Script>);

impl AxArchVCpu for Mock {
    type CreateConfig = Rc<Script>;
    type SetupConfig = u32;

    fn new(script: Rc<Script>) -> AxResult<Self> {
        script.note(Call::New)?;
        Ok(Self(script))
    }
    fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult {
        self.0.note(Call::SetEntry(entry.as_u64()))
    }
    fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult {
        self.0.note(Call::SetRoot(ept_root.as_u64()))
    }
    fn setup(&mut self, config: u32) -> AxResult {
        self.0.note(Call::Setup(config))
    }
    fn run(&mut self) -> AxResult<AxVCpuExitReason> {
        self.0.note(Call::Run)?;
        assert!(!self.0.panic_in_run.get(), "asked to");
        Ok(AxVCpuExitReason::Halt)
    }
    fn bind(&mut self) -> AxResult {
        self.0.note(Call::Bind)
    }
    fn unbind(&mut self) -> AxResult {
        self.0.note(Call::Unbind)
    }
    fn set_gpr(&mut self, reg: usize, val: usize) {
        // The trait gives it no way to fail.
        let _ = self.0.note(Call::SetGpr(reg, val));
    }
}

type Vcpu = AxVCpu<Mock, Host>;

const ENTRY: GuestPhysAddr = GuestPhysAddr::new(0x7c00);
const ROOT: HostPhysAddr = HostPhysAddr::new(0x5000);

struct Bench {
    script: Rc<Script>,
    vcpu: Vcpu,
}

impl Bench {
    fn created() -> Self {
        on_cpu(0);
        let script = Rc::new(Script::default());
        Self { vcpu: Vcpu::new(script.clone()).unwrap(), script }
    }

    /// A vCPU in `state`, reached by right calls only.
    fn in_state(state: VCpuState) -> Self {
        let mut bench = Self::created();
        let vcpu = &mut bench.vcpu;
        if state == VCpuState::Created {
            return bench;
        }
        vcpu.set_entry(ENTRY).unwrap();
        vcpu.set_ept_root(ROOT).unwrap();
        vcpu.setup(1).unwrap();
        match state {
            VCpuState::Created | VCpuState::Free => {}
            VCpuState::Ready => vcpu.bind().unwrap(),
            VCpuState::Blocked => vcpu.block().unwrap(),
            VCpuState::Failed => {
                vcpu.bind().unwrap();
                bench.script.fail.set(Some(AxError::HardwareLost));
                assert_eq!(vcpu.run(), Err(AxError::HardwareLost));
            }
            VCpuState::Running => {
                vcpu.bind().unwrap();
                bench.script.panic_in_run.set(true);
                assert!(catch_unwind(AssertUnwindSafe(|| vcpu.run())).is_err());
                bench.script.panic_in_run.set(false);
            }
        }
        assert_eq!(bench.vcpu.state(), state);
        bench
    }

    fn calls(&self) -> Vec<Call> {
        self.script.calls.borrow().clone()
    }

    /// Asserts that `call` is refused with `error` before the backend hears of it, and changes nothing.
    #[track_caller]
    fn refuses<T: core::fmt::Debug + PartialEq>(
        &mut self,
        error: AxError,
        call: impl FnOnce(&mut Vcpu) -> AxResult<T>,
    ) {
        let before = (self.vcpu.state(), self.vcpu.record(), self.calls(), std::format!("{:?}", self.vcpu));
        assert_eq!(call(&mut self.vcpu), Err(error));
        assert_eq!((self.vcpu.state(), self.vcpu.record(), self.calls(), std::format!("{:?}", self.vcpu)), before);
    }
}

#[test]
fn the_right_order_reaches_the_backend_in_that_order() {
    let mut bench = Bench::created();
    let vcpu = &mut bench.vcpu;
    // The two setters have no order among themselves.
    vcpu.set_ept_root(ROOT).unwrap();
    vcpu.set_entry(ENTRY).unwrap();
    vcpu.setup(7).unwrap();
    vcpu.set_gpr(3, 9).unwrap();
    vcpu.bind().unwrap();
    assert_eq!(vcpu.run(), Ok(AxVCpuExitReason::Halt));
    assert_eq!(vcpu.run(), Ok(AxVCpuExitReason::Halt));
    vcpu.unbind().unwrap();
    assert_eq!(
        bench.calls(),
        [
            Call::New,
            Call::SetRoot(0x5000),
            Call::SetEntry(0x7c00),
            Call::Setup(7),
            Call::SetGpr(3, 9),
            Call::Bind,
            Call::Run,
            Call::Run,
            Call::Unbind
        ]
    );
}

#[test]
fn states_follow_the_diagram() {
    let mut bench = Bench::created();
    let vcpu = &mut bench.vcpu;
    assert_eq!(vcpu.state(), VCpuState::Created);
    vcpu.set_entry(ENTRY).unwrap();
    vcpu.set_ept_root(ROOT).unwrap();
    assert_eq!(vcpu.state(), VCpuState::Created);
    vcpu.setup(0).unwrap();
    assert_eq!(vcpu.state(), VCpuState::Free);
    vcpu.bind().unwrap();
    assert_eq!(vcpu.state(), VCpuState::Ready);
    assert!(vcpu.is_bound());
    vcpu.run().unwrap();
    assert_eq!(vcpu.state(), VCpuState::Ready);
    vcpu.unbind().unwrap();
    assert_eq!(vcpu.state(), VCpuState::Free);
    assert!(!vcpu.is_bound());
    vcpu.block().unwrap();
    assert_eq!(vcpu.state(), VCpuState::Blocked);
    assert!(vcpu.wake());
    assert_eq!(vcpu.state(), VCpuState::Free);
}

/// The table of the module: for each state, the error of each call that is wrong in it.
#[test]
fn each_wrong_call_has_its_error_and_no_effect() {
    use AxError as E;
    use VCpuState as S;
    let before_setup = [
        (S::Free, E::AlreadySetUp),
        (S::Ready, E::AlreadySetUp),
        (S::Blocked, E::AlreadySetUp),
        (S::Running, E::Running),
        (S::Failed, E::Failed),
    ];
    for (state, error) in before_setup {
        let mut bench = Bench::in_state(state);
        bench.refuses(error, |v| v.set_entry(ENTRY));
        bench.refuses(error, |v| v.set_ept_root(ROOT));
        bench.refuses(error, |v| v.setup(2));
    }
    let off_the_cpu = [
        (S::Created, E::NotSetUp),
        (S::Ready, E::AlreadyBound),
        (S::Running, E::Running),
        (S::Blocked, E::Blocked),
        (S::Failed, E::Failed),
    ];
    for (state, error) in off_the_cpu {
        let mut bench = Bench::in_state(state);
        bench.refuses(error, |v| v.bind());
        bench.refuses(error, |v| v.block());
    }
    for (state, error) in [
        (S::Created, E::NotSetUp),
        (S::Free, E::NotBound),
        (S::Running, E::Running),
        (S::Blocked, E::Blocked),
        (S::Failed, E::Failed),
    ] {
        Bench::in_state(state).refuses(error, |v| v.run());
    }
    for (state, error) in
        [(S::Created, E::NotSetUp), (S::Free, E::NotBound), (S::Blocked, E::NotBound), (S::Running, E::Running)]
    {
        Bench::in_state(state).refuses(error, |v| v.unbind());
    }
    for (state, error) in [(S::Created, E::NotSetUp), (S::Running, E::Running), (S::Failed, E::Failed)] {
        let mut bench = Bench::in_state(state);
        bench.refuses(error, |v| v.set_gpr(0, 0));
        bench.refuses(error, |v| v.arch_mut().map(|_| ()));
    }
    for (state, error) in [(S::Created, E::NotSetUp), (S::Running, E::Running)] {
        Bench::in_state(state).refuses(error, |v| v.arch().map(|_| ()));
    }
    for state in [S::Created, S::Free, S::Ready, S::Running, S::Failed] {
        let mut bench = Bench::in_state(state);
        let before = (bench.vcpu.record(), bench.calls());
        assert!(!bench.vcpu.wake());
        assert_eq!((bench.vcpu.state(), (bench.vcpu.record(), bench.calls())), (state, before));
    }
}

#[test]
fn the_backend_can_be_reached_in_every_state_that_has_one_to_show() {
    for state in [VCpuState::Free, VCpuState::Ready, VCpuState::Blocked, VCpuState::Failed] {
        assert!(Bench::in_state(state).vcpu.arch().is_ok(), "{state:?}");
    }
    for state in [VCpuState::Free, VCpuState::Ready, VCpuState::Blocked] {
        let mut bench = Bench::in_state(state);
        assert!(bench.vcpu.arch_mut().is_ok(), "{state:?}");
        bench.vcpu.set_gpr(1, 2).unwrap();
        assert_eq!(bench.calls().last(), Some(&Call::SetGpr(1, 2)));
    }
}

#[test]
fn entry_and_root_are_set_once_and_both_before_setup() {
    let mut bench = Bench::created();
    bench.refuses(AxError::EntryNotSet, |v| v.setup(0));
    bench.vcpu.set_entry(ENTRY).unwrap();
    bench.refuses(AxError::EntryAlreadySet, |v| v.set_entry(ENTRY));
    bench.refuses(AxError::EptRootNotSet, |v| v.setup(0));
    bench.vcpu.set_ept_root(ROOT).unwrap();
    bench.refuses(AxError::EptRootAlreadySet, |v| v.set_ept_root(ROOT));
    bench.refuses(AxError::EntryAlreadySet, |v| v.set_entry(ENTRY));
    bench.vcpu.setup(0).unwrap();
    bench.refuses(AxError::AlreadySetUp, |v| v.setup(0));

    let mut bench = Bench::created();
    bench.vcpu.set_ept_root(ROOT).unwrap();
    bench.refuses(AxError::EntryNotSet, |v| v.setup(0));
}

#[test]
fn a_vcpu_survives_every_wrong_call_in_every_state() {
    for state in [VCpuState::Created, VCpuState::Free, VCpuState::Ready, VCpuState::Blocked] {
        let Bench { mut vcpu, .. } = Bench::in_state(state);
        if state != VCpuState::Created {
            assert!(vcpu.set_entry(ENTRY).is_err() && vcpu.set_ept_root(ROOT).is_err() && vcpu.setup(0).is_err());
        }
        if state != VCpuState::Free {
            assert!(vcpu.bind().is_err() && vcpu.block().is_err());
        }
        if state != VCpuState::Ready {
            assert!(vcpu.run().is_err() && vcpu.unbind().is_err());
        }
        match state {
            VCpuState::Created => {
                vcpu.set_entry(ENTRY).unwrap();
                vcpu.set_ept_root(ROOT).unwrap();
                vcpu.setup(0).unwrap();
                vcpu.bind().unwrap();
            }
            VCpuState::Free => vcpu.bind().unwrap(),
            VCpuState::Blocked => {
                assert!(vcpu.wake());
                vcpu.bind().unwrap();
            }
            _ => {}
        }
        assert_eq!(vcpu.run(), Ok(AxVCpuExitReason::Halt), "{state:?}");
        vcpu.unbind().unwrap();
    }
}

#[test]
fn backend_errors_before_running_leave_the_call_to_be_repeated() {
    let script = Rc::new(Script::default());
    script.fail.set(Some(AxError::NoMemory));
    assert_eq!(Vcpu::new(script).err(), Some(AxError::NoMemory));

    let Bench { script, mut vcpu } = Bench::created();
    script.fail.set(Some(AxError::InvalidInput));
    assert_eq!(vcpu.set_entry(ENTRY), Err(AxError::InvalidInput));
    assert_eq!(vcpu.set_entry(ENTRY), Ok(()));
    script.fail.set(Some(AxError::Unsupported));
    assert_eq!(vcpu.set_ept_root(ROOT), Err(AxError::Unsupported));
    assert_eq!(vcpu.set_ept_root(ROOT), Ok(()));
    script.fail.set(Some(AxError::NoMemory));
    assert_eq!(vcpu.setup(0), Err(AxError::NoMemory));
    assert_eq!(vcpu.state(), VCpuState::Created);
    assert_eq!(vcpu.setup(0), Ok(()));
    let record = vcpu.record();
    script.fail.set(Some(AxError::HardwareBusy));
    assert_eq!(vcpu.bind(), Err(AxError::HardwareBusy));
    assert_eq!((vcpu.state(), vcpu.record()), (VCpuState::Free, record));
    assert_eq!(vcpu.bind(), Ok(()));
}

#[test]
fn an_error_of_run_is_final_but_the_cpu_can_be_left() {
    let mut bench = Bench::in_state(VCpuState::Failed);
    assert!(bench.vcpu.is_bound());
    on_cpu(1);
    bench.refuses(AxError::WrongCpu, |v| v.unbind());
    on_cpu(0);
    bench.vcpu.unbind().unwrap();
    assert_eq!(bench.calls().last(), Some(&Call::Unbind));
    assert_eq!(bench.vcpu.state(), VCpuState::Failed);
    assert!(!bench.vcpu.is_bound());
    bench.refuses(AxError::NotBound, |v| v.unbind());
    bench.refuses(AxError::Failed, |v| v.bind());
    bench.refuses(AxError::Failed, |v| v.run());
}

#[test]
fn an_error_of_unbind_is_told_and_the_vcpu_is_off_the_cpu() {
    let Bench { script, mut vcpu } = Bench::in_state(VCpuState::Ready);
    script.fail.set(Some(AxError::HardwareLost));
    assert_eq!(vcpu.unbind(), Err(AxError::HardwareLost));
    assert_eq!((vcpu.state(), vcpu.record().bound_cpu), (VCpuState::Free, None));
    vcpu.bind().unwrap();
}

#[test]
fn run_and_unbind_are_refused_on_another_cpu() {
    let mut bench = Bench::in_state(VCpuState::Ready);
    on_cpu(3);
    bench.refuses(AxError::WrongCpu, |v| v.run());
    bench.refuses(AxError::WrongCpu, |v| v.unbind());
    on_cpu(0);
    bench.vcpu.run().unwrap();
    bench.vcpu.unbind().unwrap();
}

#[test]
fn several_entries_in_one_call_are_counted() {
    let Bench { script, mut vcpu } = Bench::in_state(VCpuState::Ready);
    let calls = script.calls.borrow().len();
    assert_eq!(*vcpu.exit(), AxVCpuExitReason::Nothing);
    let result = vcpu.run_by(|arch, entries, exit| {
        *entries += 2;
        arch.run()?;
        arch.run()?;
        *exit = arch.run()?;
        Ok(())
    });
    assert_eq!((result, vcpu.state(), vcpu.record().entries), (Ok(()), VCpuState::Ready, 3));
    assert_eq!(*vcpu.exit(), AxVCpuExitReason::Halt);
    assert_eq!(script.calls.borrow().len(), calls + 3);
    vcpu.request_exit();
    assert_eq!(vcpu.run_by(|_, _, _| panic!("entered")), Ok(()));
    assert_eq!(*vcpu.exit(), AxVCpuExitReason::Interrupted);
}

#[test]
fn an_exit_request_is_sticky_and_stops_one_entry() {
    let Bench { script, mut vcpu } = Bench::in_state(VCpuState::Free);
    vcpu.request_exit();
    vcpu.request_exit();
    vcpu.block().unwrap();
    vcpu.wake();
    assert_eq!(vcpu.run(), Err(AxError::NotBound));
    vcpu.bind().unwrap();
    assert!(vcpu.record().exit_requested);
    assert_eq!(vcpu.run(), Ok(AxVCpuExitReason::Interrupted));
    assert_eq!(vcpu.record().entries, 0);
    assert_eq!(script.calls.borrow().last(), Some(&Call::Bind));
    assert_eq!(vcpu.run(), Ok(AxVCpuExitReason::Halt));
    assert_eq!(vcpu.record().entries, 1);

    vcpu.request_exit();
    assert!(vcpu.take_exit_request());
    assert!(!vcpu.take_exit_request());
    assert_eq!(vcpu.run(), Ok(AxVCpuExitReason::Halt));
}

#[test]
fn the_record_tells_running_from_waiting_from_sleeping() {
    // What was before setup is nobody's waiting.
    pass(50_000);
    let Bench { mut vcpu, .. } = Bench::in_state(VCpuState::Free);
    assert_eq!(vcpu.record(), SchedulingRecord::default());
    pass(10);
    vcpu.bind().unwrap();
    pass(100);
    vcpu.run().unwrap();
    vcpu.run().unwrap();
    // What has not ended does not count yet.
    assert_eq!(vcpu.record().run_ns, 0);
    vcpu.unbind().unwrap();
    let unbound_at = NOW.get();
    pass(1);
    vcpu.block().unwrap();
    pass(1000);
    vcpu.wake();
    pass(2);
    on_cpu(5);
    vcpu.bind().unwrap();
    assert_eq!(
        vcpu.record(),
        SchedulingRecord {
            bound_cpu: Some(5),
            last_cpu: Some(5),
            last_run_ns: Some(unbound_at),
            run_ns: 100,
            wait_ns: 13,
            halt_ns: 1000,
            windows: 2,
            entries: 2,
            migrations: 1,
            exit_requested: false,
        }
    );
    pass(7);
    vcpu.unbind().unwrap();
    // Back on the same CPU: no migration. A clock that stands a little behind gives no time at all, not ages.
    NOW.set(NOW.get() - 3);
    vcpu.bind().unwrap();
    let record = vcpu.record();
    assert_eq!((record.migrations, record.run_ns, record.wait_ns, record.windows), (1, 107, 13, 3));
}

#[test]
fn every_error_has_an_errno_and_a_text_of_its_own() {
    let mut texts: Vec<&str> = AxError::ALL.iter().map(|e| e.message()).collect();
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), AxError::ALL.len());
    assert!(AxError::ALL.iter().all(|e| (1..4096).contains(&e.errno())));
}
