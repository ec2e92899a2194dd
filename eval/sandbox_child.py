"""What eval/sandbox.py starts for each program: a judge, and the player it forks, which runs the program.

    python -s -S -B sandbox_child.py SECONDS CPU_SECONDS MEMORY_MB OUTPUT_BYTES FILE_BYTES PROCESSES < job
    python -s -S -B sandbox_child.py play        the player alone, on systems that cannot fork

The judge leaves the network, takes away what it may, forks the player and only then reads the job, so that the player's
memory never held the tests. The player confines itself, runs the program, puts back what the program may have replaced,
asks for the tests, and answers with a password that came with them. On the judge's standard output: what is in force,
then the verdict. Nothing here is imported that costs milliseconds: this starts once a program.
"""

import marshal
import os
import sys
import time

# Linux's own numbers (sched.h, mount.h, prctl.h, capability.h); the os module has some of them from Python 3.12 only.
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NO_SUID, NO_DEVICES, NO_EXEC, PRIVATE_BELOW = 2, 4, 8, 0x44000
MOUNT_SETATTR, HERE, WHOLE_TREE = 442, -100, 0x8000  # the number of this system call is the same on every machine
DIE_WITH_PARENT, DUMPABLE, ADOPT_ORPHANS, NO_NEW_PRIVILEGES = 1, 4, 36, 38
CAPABILITIES = 0x20080522  # version 3
FILTER, LOAD, IF_EQUAL, RETURN, ALLOW, REFUSE = 22, 0x20, 0x15, 0x06, 0x7FFF0000, 0x50001  # REFUSE: "not permitted"
# Refused where no namespace can be had, by machine: its number in linux/audit.h, and those of socket, kill, tkill,
# tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, ptrace, process_vm_readv, -_writev, pidfd_send_signal, io_uring_setup.
CALLS = {
    "x86_64": (0xC000003E, [41, 62, 200, 234, 129, 297, 101, 310, 311, 424, 425]),
    "aarch64": (0xC00000B7, [198, 129, 130, 131, 138, 240, 117, 270, 271, 424, 425]),
}

CLIP = 4000  # bytes of what the player answers: one write of less than 4,096 is never split
OWN_USERS = 1_900_000_000  # plus a process id: user ids that no system hands out
NARROW_USERS = 40_000  # the same in containers that map only 65,536 of them


def main(argv: list[str]) -> None:
    """The judge. It ends by killing its process group, itself included: nothing that it started outlives it."""
    seconds, limits = float(argv[0]), [int(text) for text in argv[1:]]  # cpu, memory, output, file, processes
    me, facts = os.getpid(), isolate(limits)
    init = start_init() if "namespaces" in facts else 0
    (down_read, down), (up, up_write), (said, said_write) = os.pipe(), os.pipe(), os.pipe()
    player = os.fork()
    if player == 0:
        try:
            facts += confine(down_read, up_write, said_write, limits, me, "namespaces" in facts)
            os.write(up_write, " ".join(["ready", *facts]).encode() + b"\n")
        except BaseException as error:
            os.write(up_write, f"{type(error).__name__}: {error}".encode()[:CLIP])
            os._exit(1)
        play(down_read, up_write)
    for fd in (down_read, up_write, said_write):
        os.close(fd)
    ready = os.read(up, CLIP)
    if not ready.startswith(b"ready"):
        raise OSError(ready.decode() or "the player died before it was confined")
    os.write(1, ready)
    program, tests, modules = marshal.load(sys.stdin.buffer)
    passwords = [os.urandom(16).hex() for _ in range(2)]
    messages = [pack((program, modules, passwords[0])), pack((tests, passwords[1]))]
    status, detail = judge(player, down, up, said, messages, passwords, seconds, limits)
    sweep(init, ready.decode())
    os.write(1, f"{status}\n{detail}".encode(errors="replace"))
    os.killpg(0, 9)


def isolate(limits: list[int]) -> list[str]:
    """Leave the network and, in a view of the files of our own, make all but the working folder read-only.

    Returns facts, a word each: namespaces, readonly, memory_folder. Off Linux and where it is forbidden, none.
    """
    if sys.platform != "linux":
        return []
    libc = load_libc()
    write_file("/proc/self/oom_score_adj", "1000")  # if the machine runs out of memory, this goes before anything else
    facts, user, group = [], os.geteuid(), os.getegid()
    flags = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK | (NEW_USER if user else 0)
    if libc.unshare(flags) == 0:
        facts.append("namespaces")
        if user:  # an ordinary user may do the rest in a user namespace, as itself
            write_file("/proc/self/setgroups", "deny")
            write_file("/proc/self/uid_map", f"{user} {user} 1")
            write_file("/proc/self/gid_map", f"{group} {group} 1")
        libc.mount(None, b"/", None, PRIVATE_BELOW, None)
        read_only = (1).to_bytes(8, sys.byteorder) + bytes(24)  # struct mount_attr: set read-only, clear nothing
        if libc.syscall(MOUNT_SETATTR, HERE, b"/", WHOLE_TREE, read_only, len(read_only)) == 0:
            facts.append("readonly")
        folder, size = os.getcwd(), f"size={limits[3]},nr_inodes=1024,mode=0777"
        if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", NO_SUID | NO_DEVICES, size.encode()) == 0:
            facts.append("memory_folder")
            os.chdir(folder)  # the name leads to the new folder, but we still stand in the one below it
    libc.prctl(DIE_WITH_PARENT, 9)  # a new user namespace resets it
    libc.prctl(ADOPT_ORPHANS, 1)
    libc.prctl(DUMPABLE, 0)  # who has our user id may not look into us through /proc or a debugger
    return facts


def start_init() -> int:
    """Fork the first process of the new process namespace. It sleeps; when it dies, the kernel kills the rest."""
    init = os.fork()
    if init == 0:
        load_libc().prctl(DIE_WITH_PARENT, 9)
        os.closerange(0, 64)
        while True:
            time.sleep(1000)
    return init


def confine(down: int, up: int, said: int, limits: list[int], judge_id: int, namespaces: bool) -> list[str]:
    """Take from this process what the program must not have. Returns facts: user=ID, filter, no_NAME (a limit)."""
    linux = sys.platform == "linux"
    libc = load_libc() if linux else None
    if namespaces:
        libc.mount(b"proc", b"/proc", b"proc", NO_SUID | NO_DEVICES | NO_EXEC, None)  # with our processes only
    only_descriptors(down, up, said)
    sys.argv[:] = [""]
    os.environ.clear()
    library = [(path, os.open(path, os.O_RDONLY)) for path in sys.path if os.path.isdir(path)]
    user = drop_user(judge_id) if os.geteuid() == 0 else 0
    keep_library(library)
    if linux:
        libc.prctl(DIE_WITH_PARENT, 9)  # again, as a change of user resets it
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.capset(CAPABILITIES.to_bytes(4, sys.byteorder) + bytes(4), bytes(24))
    filtered = linux and not namespaces and refuse_calls(libc, CALLS.get(os.uname().machine))
    # The count is per user. Ours alone it is under a user of its own, and in a user namespace, which counts the judge
    # and the first process too. Else others share it, and one, itself, is the only number that does not depend on them.
    others, own = (0, True) if user else (2, True) if namespaces else (0, False)
    facts = set_limits(limits, others + limits[4] if own else 1)
    return facts + ["filter"] * filtered + [f"user={user}"] * bool(user)


def only_descriptors(down: int, up: int, said: int) -> None:
    """Nothing to read, said for what it prints, and the two pipes; all else is closed."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd, behind in enumerate((nothing, said, said)):
        os.dup2(behind, fd)
    first, last = sorted((down, up))
    for start, end in ((3, first), (first + 1, last), (last + 1, 256)):  # the judge itself had three and the pipes
        os.closerange(start, end)


def drop_user(judge_id: int) -> int:
    """Become a user that nothing else runs as, the folder with us; 0, and nothing changed, if there is only root."""
    for user in (OWN_USERS + judge_id, NARROW_USERS + judge_id % 20_000):
        try:
            os.chown(".", user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return user
        except OSError:
            continue
    return 0


def keep_library(folders: list[tuple[str, int]]) -> None:
    """Import the standard library through open folders if it lies where only root may go, as in root's home."""
    if os.access(os.__file__, os.R_OK):
        for _, fd in folders:
            os.close(fd)
        return
    moved = {path: f"/proc/self/fd/{fd}" for path, fd in folders}
    sys.path[:] = moved.values()
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        for home in getattr(module, "__path__", [])[:]:
            parent, name = os.path.split(home)
            module.__path__ = [os.path.join(moved.get(parent, parent), name)]


def refuse_calls(libc, calls: tuple[int, list[int]] | None) -> bool:
    """Have the kernel refuse system calls of this process and its children; False where it or we cannot. seccomp(2)."""
    if calls is None or sys.maxsize < 1 << 32:  # a 32-bit process has other numbers
        return False
    import ctypes
    import struct

    machine, numbers = calls
    steps = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, machine), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, 0)]
    for number in numbers:
        steps += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    steps.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    return libc.prctl(FILTER, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0) == 0


def set_limits(limits: list[int], processes: int) -> list[str]:
    """Set the limits of this process, never above those it has. Returns no_NAME for each that the system refuses."""
    import resource

    cpu, memory, _, file, _ = limits
    wanted = {"CPU": cpu, "AS": memory << 20, "FSIZE": file, "NPROC": processes, "NOFILE": 64, "CORE": 0}
    refused = []
    for name, value in wanted.items():
        try:
            kind = getattr(resource, f"RLIMIT_{name}")
            _, top = resource.getrlimit(kind)
            hard = value + (name == "CPU")  # its signal can be caught; a second later comes one that cannot
            hard = hard if top == resource.RLIM_INFINITY else min(hard, top)
            resource.setrlimit(kind, (min(value, hard), hard))
        except (AttributeError, OSError, ValueError):
            refused.append(f"no_{name}")
    return refused


def judge(player, down, up, said, messages, passwords, seconds, limits) -> tuple[str, str]:
    """(status, detail) of the player, which is dead and reaped afterwards. Never waits for it longer than seconds."""
    import select

    deadline, stage, unsent, ended, reason = time.monotonic() + seconds, 0, messages[0], (0, 0, None), ""
    answer, tail, length = b"", b"", 0
    os.set_blocking(down, False)
    poll = select.poll()
    for fd in (up, said, down):
        poll.register(fd, select.POLLOUT if fd == down else select.POLLIN)
    while not ended[0] and not reason and not answer.endswith(b"\n"):
        ended = os.wait4(player, os.WNOHANG)  # before reading, so that its last words are read
        for fd, _ in poll.poll(50):  # ms; no end of file may come, as children of its hold the pipes open
            if fd == down:
                try:
                    unsent = unsent[os.write(down, unsent) :]
                except OSError:  # it closed its end
                    unsent = b""
                more = bool(unsent)
            else:
                chunk = os.read(fd, 65536)
                more = bool(chunk)
                if fd == up:
                    answer += chunk
                else:
                    tail, length = (tail + chunk)[-CLIP:], length + len(chunk)
            if not more:
                poll.unregister(fd)
        if stage == 0 and answer == passwords[0].encode() + b"\n":  # the program has run: now the tests
            answer, unsent, stage = b"", messages[1], 1
            poll.register(down, select.POLLOUT)
        if length > limits[2]:
            reason = "output"
        elif len(answer) > 2 * CLIP:
            reason = "failed"  # no answer of ours is so long
        elif time.monotonic() > deadline:
            reason = "timeout"
    if not ended[0]:
        os.kill(player, 9)
        ended = os.wait4(player, 0)
    if not reason and stage == 1 and answer == passwords[1].encode() + b"\n":
        return "passed", ""
    said_last = tail.decode(errors="replace").strip().rpartition("\n")[2]
    return why(reason, answer.decode(errors="replace"), ended[1], ended[2], said_last, seconds, limits)


def why(reason: str, answer: str, code: int, usage, said: str, seconds: float, limits: list[int]) -> tuple[str, str]:
    """(status, detail) of a player that did not pass. code, usage: what wait4 gave."""
    status, _, detail = answer.partition(" ")
    if reason == "output":
        return reason, f"wrote more than {limits[2]} bytes"
    if reason == "timeout":
        return reason, said or f"ran for {seconds:g} s"
    if os.WIFSIGNALED(code) and (os.WTERMSIG(code) == 24 or usage.ru_utime + usage.ru_stime >= limits[0]):  # SIGXCPU
        return "timeout", said or f"used {limits[0]} s of CPU"
    if status in ("failed", "memory", "exit", "not_python"):
        return status, detail
    if answer:
        return "failed", "wrote to the descriptor of its verdict"
    if os.WIFSIGNALED(code):
        return "killed", said or f"by signal {os.WTERMSIG(code)}"
    return "exit", said or f"left with status {os.WEXITSTATUS(code)} before its tests ended"


def sweep(init: int, ready: str) -> None:
    """Kill and reap what the player may have left: all of its namespace or else, as root, all of its user."""
    user = ready.partition("user=")[2]
    if init:
        os.kill(init, 9)
        os.waitpid(init, 0)
    elif user:
        helper = os.fork()
        if helper == 0:
            try:
                os.setresuid(int(user), int(user), int(user))
                os.kill(-1, 9)  # all that this user may, which is only its own
            finally:
                os._exit(0)
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            pass


def play(down: int, up: int) -> None:
    """Run the program, then the tests in its names; write the first password in between and the second at the end.

    What is needed after the program has run is held in local names before it runs, as it may replace all others.
    """
    write, leave, untrace, unprofile = os.write, os._exit, sys.settrace, sys.setprofile
    no_memory, anything = MemoryError, BaseException
    program, modules, password = receive(down)
    for name in modules:
        try:
            __import__(name)
        except ImportError:  # the tests will say so
            pass
    loaded, before = sys.modules, dict(sys.modules)
    undo = [(vars(module).update, dict(vars(module))) for module in before.values()]
    answer = type(sys)("answer")  # a module, as dataclasses look their own up
    loaded["answer"], names, builtins = answer, vars(answer), before["builtins"]

    def restore():
        untrace(None)
        unprofile(None)
        loaded.update(before)
        for update, old in undo:
            update(old)
        names["__builtins__"] = builtins

    stage = "not_python"
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
        stage = "failed"
        exec(code, names)
        restore()
        write(up, password.encode() + b"\n")
        tests, password = receive(down)
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
        write(up, password.encode() + b"\n")
    except no_memory:  # may be all there is to say: to format anything takes memory
        write(up, b"memory MemoryError\n" if stage == "failed" else b"not_python MemoryError\n")
    except anything as error:
        restore()
        write(up, describe(error, stage))
    finally:
        leave(0)


def describe(error: BaseException, stage: str) -> bytes:
    """The line that the judge reads: a status and what went wrong, with the line of the tests where it did."""
    try:
        if isinstance(error, SystemExit) and stage == "failed":
            return f"exit SystemExit: {error} before its tests ended".replace("\n", " ").encode()[:CLIP] + b"\n"
        text, trace, line = f"{type(error).__name__}: {error}".strip(": "), error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<tests>" else line
            trace = trace.tb_next
        text += f" (line {line} of the tests)" if line else ""
        return f"{stage} {text}".replace("\n", " ").encode(errors="replace")[:CLIP] + b"\n"
    except BaseException:  # its own __str__ may do anything
        return stage.encode() + b" an exception that cannot be shown\n"


def pack(message: tuple) -> bytes:
    """A message as receive() reads it: its length in 8 bytes, then marshal's bytes, which stay on this machine."""
    data = marshal.dumps(message)
    return len(data).to_bytes(8, "big") + data


def receive(fd: int):
    """Read one message of pack() and not a byte more."""
    data, wanted = b"", 8
    while len(data) < wanted:
        chunk = os.read(fd, wanted - len(data))
        if not chunk:
            os._exit(1)  # the judge is gone
        data += chunk
        if wanted == 8 and len(data) == 8:
            data, wanted = b"", int.from_bytes(data, "big")
    return marshal.loads(data)


def write_file(path: str, text: str) -> None:
    """Write to a file of /proc; what the system does not let us set stays as it is."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass


def load_libc():
    """The C library, for what the os module lacks."""
    import ctypes

    return ctypes.CDLL(None)


if __name__ == "__main__":
    del sys.path[0]  # this folder; a program imports from the standard library only
    if sys.argv[1:] == ["play"]:
        channel = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nothing, standard)
        os.environ.clear()
        play(*channel)
    main(sys.argv[1:])
