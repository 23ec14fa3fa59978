"""The daemon: for each rule it watches a source, waits until files are at rest, and migrates them.

Each rule has a thread, and they work one after the other (``turns``). Where a source or destination stops answering in
the middle of the work, its thread stands still, since the kernel lets nobody out of such a call; the main thread asks
whoever is at work for long, passes that one over, and says so in status and log. watchdog's threads only collect paths,
and the control socket's only answer.

A rule opens source and destination when there is work, and closes them when there is none: an idle daemon keeps neither
a mount nor a memory card from being unmounted. What a rule can't reach it tries again later, and says so once.

Everything the daemon knows can be found again by a walk, so nothing of it needs saving but the journal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from esrfs.store.beneath import beneath
from esrfs.store.initialise import what_marks
from esrfs_daemon import config, sources, walk
from esrfs_daemon.asking import answers, opened_folder, real_path
from esrfs_daemon.config import Config, Rule
from esrfs_daemon.destination import NotMounted, opened
from esrfs_daemon.journal import Busy, Journal, JournalError
from esrfs_daemon.migration import Migration
from esrfs_daemon.report import DestinationLost, NoRoom, Note, Progress
from esrfs_daemon.settle import Settling
from esrfs_daemon.status import RuleStatus, Status
from esrfs_daemon.suitable import Refused, refuse_unsuitable
from esrfs_daemon.throttle import Bucket, Stopped, Throttle
from esrfs_daemon.turns import Turns
from esrfs_daemon.walk import Filters, Found, Unmovable
from esrfs_daemon.watch import EventsUnavailable, Watch

log = logging.getLogger("esrfs.daemon")

_RETRY_SECONDS = 30.0
_SLICE = 2000
"""Files that a walk looks at before others have their turn."""
_MOST_SETTLING = 20_000
"""Files that wait to be at rest at the same time: bounds memory, whatever a source holds."""
_MOST_PROBLEMS = 10_000
_LOOK_SECONDS = 10.0
"""Of a rule that is at work for longer, source and destination are asked whether they answer, and again so often."""
_LONG_SECONDS = 600.0
"""No turn keeps other rules waiting for longer."""
_LAST_SECONDS = 5.0
"""At the end, they are asked so often."""


class Service:
    """The daemon's work; :meth:`run` does it until :meth:`stop`. ``status`` may be asked by any thread."""

    def __init__(self, settings: Config) -> None:
        self._stop = threading.Event()
        self._turns = Turns()
        self._hanging: set[int] = set()
        """Rules that were passed over, by number."""
        self._bug: BaseException | None = None
        self.left_behind = False
        """:meth:`run` has ended without a thread that waits for a filesystem."""
        # Not opened now: where that fails (a full disk), the rules say so, and try again.
        self._journal = Journal(Path(config.expanded(settings.journal)) if settings.journal else None, at_once=False)
        bucket = Bucket()
        self.status = Status([_status_of(rule) for rule in settings.rules])
        self._rules = [
            _Rule(
                number,
                rule,
                settings,
                self._journal,
                throttle=Throttle(settings.throttle, self._stop, bucket),
                status=self.status,
            )
            for number, rule in enumerate(settings.rules)
        ]

    def run(self) -> None:
        """Work until :meth:`stop`."""
        threads = [
            threading.Thread(target=self._follow, args=(number, rule), name=f"rule-{number}", daemon=True)
            for number, rule in enumerate(self._rules)
        ]
        try:
            for thread in threads:
                thread.start()
            while not self._stop.wait(_LOOK_SECONDS):
                self._look_after_turn()
        finally:
            self.stop()
            self._turns.end()
            for rule, thread in zip(self._rules, threads, strict=True):
                self._wait_for(rule, thread)
            if not self.left_behind:
                self._journal.close()
        if self._bug is not None:
            raise self._bug

    def _look_after_turn(self) -> None:
        for known in [known for known in self._hanging if not self._rules[known].silent()]:
            self._hanging.discard(known)
            self._rules[known].hangs("")
        number = self._turns.at_work(_LOOK_SECONDS)
        if number is None or self._rules[number].is_paused:  # which holds for all
            return
        silent = self._rules[number].silent()
        if silent and self._turns.pass_over(number):
            self._hanging.add(number)
            self._rules[number].hangs(silent)
        elif self._turns.at_work(_LONG_SECONDS) == number:
            self._turns.pass_over(number)  # much to copy, or something deep inside hangs

    def _follow(self, number: int, rule: _Rule) -> None:
        """One rule, in its thread."""
        try:
            try:
                while not self._stop.is_set():
                    rule.wake.clear()
                    with self._turns.of(number):
                        pause = rule.turn()
                    if pause > 0:
                        rule.wake.wait(min(pause, 3600.0))
            except Stopped:
                pass
            finally:
                rule.close()
        except BaseException as error:  # the main thread's to raise
            self._bug = error
            self.stop()

    def _wait_for(self, rule: _Rule, thread: threading.Thread) -> None:
        """Until it has ended, or it stands still."""
        while thread.is_alive():
            thread.join(_LAST_SECONDS)
            if thread.is_alive() and (silent := rule.silent()):
                self.left_behind = True
                log.warning("%s does not answer; what is unfinished there the next start puts right", silent)
                return

    def run_once(self) -> bool:
        """Walk each source once, migrate what is in it, and end; True if every rule could be followed to its end."""
        try:
            for rule in self._rules:
                rule.watches = False
                while not rule.is_done and not rule.trouble and not self._stop.is_set():
                    self._stop.wait(min(rule.turn(), 1.0))
            return not self._stop.is_set() and not any(rule.trouble or rule.problems for rule in self._rules)
        except Stopped:
            return False
        finally:
            self._close()

    def stop(self) -> None:
        """End after the files that are being copied. May be called from a signal handler."""
        self._stop.set()
        for rule in self._rules:
            rule.wake.set()

    def reconcile(self) -> None:
        """Walk all sources now."""
        for rule in self._rules:
            rule.walk_now()
            rule.wake.set()

    def _close(self) -> None:
        for rule in self._rules:
            rule.close()
        self._journal.close()


def _status_of(rule: Rule) -> RuleStatus:
    return RuleStatus(
        name=rule.name or os.path.basename(config.expanded(rule.source)),
        source=config.expanded(rule.source),
        destination=config.expanded(rule.destination),
        then=rule.then,
    )


class _Session:
    """Source and destination, open, while there is work; holds the source against other migrations."""

    def __init__(self, rule: Rule, journal: Journal, throttle: Throttle, retry_left: bool) -> None:
        """Raises what stands in the way."""
        self._stack = contextlib.ExitStack()
        try:
            self.source = real_path(config.expanded(rule.source))
            self.source_fd = self._stack.enter_context(opened_folder(self.source))
            to = self._stack.enter_context(opened(config.expanded(rule.destination)))
            refuse_unsuitable(self.source, self.source_fd, to)
            self._stack.enter_context(journal.holding(self.source))
            self.migrated = 0
            self.migrated_bytes = 0
            self.migration = Migration(
                self.source,
                self.source_fd,
                to,
                journal,
                throttle,
                then=rule.then,
                even_if_mirrored=rule.even_if_mirrored,
                retry_left=retry_left,
                tell=self._count,
            )
            self._stack.callback(self.migration.close)
            self.migration.recover()
        except BaseException:
            self._stack.close()
            raise

    def _count(self, progress: Progress) -> None:
        self.migrated += progress.files
        self.migrated_bytes += progress.bytes

    def close(self) -> None:
        """Raises OSError, DestinationLost, JournalError."""
        self._stack.close()


class _Rule:
    def __init__(
        self,
        number: int,
        rule: Rule,
        settings: Config,
        journal: Journal,
        *,
        throttle: Throttle,
        status: Status,
    ) -> None:
        self._number = number
        self._rule = rule
        self._between = settings.reconcile_seconds
        self._journal = journal
        self._throttle = throttle
        self._throttle.on_pause = self._paused
        self._status = status
        self.wake = threading.Event()
        """Set when there is something to do before the pause is over."""
        self._filters = Filters(rule.include, rule.exclude)
        self._settling = Settling(rule.quiet)
        self._session: _Session | None = None
        self._watch: Watch | None = None
        self._watched: tuple[int, int] | None = None
        self._polling = rule.polling
        self._walker: Iterator[Found] | None = None
        self._folders: set[str] = set()
        self._next_walk = 0.0
        self._retry_at = 0.0
        self._walked_in_full = False
        self._has_failing_journal = False
        self.watches = True
        self.is_paused = False
        self._hang = ""
        self.trouble = ""
        """Why nothing can be done now; empty while all is well."""
        self.problems: dict[str, str] = {}
        """Path → why it can't be migrated; each is logged once."""

    # ---- for the service

    @property
    def is_done(self) -> bool:
        """A full walk has come to its end, and nothing is waited for."""
        return self._walked_in_full and self._walker is None and not len(self._settling)

    def walk_now(self) -> None:
        self._next_walk = self._retry_at = 0.0

    def turn(self) -> float:
        """Do what there is to do now; the seconds after which to be called again. Raises Stopped."""
        now = time.monotonic()
        if now < self._retry_at:
            return self._retry_at - now
        try:
            if self._has_failing_journal:
                self._journal.make_room()  # before anything is copied that could not be recorded again
                self._has_failing_journal = False
            pause = self._turn(now)
        except (NotMounted, DestinationLost, NoRoom, Busy, Refused, JournalError, OSError) as error:
            return self._wait_for(error)
        if self.trouble:
            log.info("%s: going on", self._name)
            self.trouble = ""
        return pause

    def silent(self) -> str:
        """Which of source and destination does not answer; empty if both do. For any thread."""
        paths = (config.expanded(self._rule.source), config.expanded(self._rule.destination))
        return next((path for path in paths if not answers(path)), "")

    def hangs(self, path: str) -> None:
        """For the main thread: what :meth:`turn` waits for does not answer; empty: it does again."""
        if path:
            self._hang = self.trouble = f"{path}: what is mounted there does not answer; work goes on when it does"
            log.warning("%s: waiting: %s", self._name, self.trouble)
            self._status.update(self._number, state="waiting", reason=self.trouble)
        elif self.trouble == self._hang:  # else that turn has ended already
            self.trouble = ""
            log.info("%s: going on", self._name)
            self._status.update(self._number, state="working", reason="")

    def close(self) -> None:
        try:
            self._end_session()
        except JournalError as error:
            log.warning("%s: %s. The next start does what was left to do", self._name, error)
        self._end_watch()
        self._status.update(self._number, state="stopping", reason="")

    # ---- the work

    @property
    def _name(self) -> str:
        return self._rule.name or os.path.basename(config.expanded(self._rule.source))

    def _turn(self, now: float) -> float:
        self._keep_watch()
        files: set[str] = set()
        if self._watch is not None:
            files, folders, lost = self._watch.drain()
            self._folders |= folders
            if lost:
                self._next_walk = now
        if not (files or self._folders or self._walker or now >= self._next_walk or self._settling.next_due() == 0.0):
            return self._rest(now)
        session = self._open_session()
        self._status.update(self._number, state="working", reason="")
        self._look_at(session, files)
        found: list[Found] = []
        while self._folders:
            found += self._walk_folder(session, self._folders.pop())
        found += self._walk_on(session, now)
        due = list(self._settling.take(session.source_fd, session.migration.nested))
        try:
            session.migration.run([*found, *due])
        finally:
            self._account(session)
        if self._walker is not None or self._settling.next_due() == 0.0:
            # While the settling files are as many as may be, more can't be looked at.
            return self._nap() if len(self._settling) >= _MOST_SETTLING else 0.0
        return self._rest(time.monotonic())

    def _nap(self) -> float:
        return max(0.05, self._settling.next_due() or 0.0)

    def _rest(self, now: float) -> float:
        self._end_session()
        waiting = len(self._settling)
        self._status.update(self._number, state="idle", reason="", waiting_files=waiting)
        due = self._settling.next_due()
        until_walk = max(0.0, self._next_walk - now)
        return until_walk if due is None else min(until_walk, due + 0.01)

    def _look_at(self, session: _Session, files: set[str]) -> None:
        """Files that events named begin to settle. Raises OSError."""
        reasons: dict[str, str] = {}
        for path in sorted(files):
            above, _, name = path.rpartition("/")
            if self._is_left_out(session.source, above):
                continue
            if self._is_nested(session, path if path in session.migration.nested.views() else above):
                continue
            try:
                directory = beneath(session.source_fd, above, os.O_PATH | os.O_DIRECTORY)
            except OSError:
                continue  # gone, or by now something else: the walk knows
            try:
                found = walk.look(directory, name, path, self._filters, self._unmovable)
            finally:
                os.close(directory)
            if found is not None and found.kind != "directory":
                mirrored = self._mirrored(session, above, reasons)
                self._settle(session, Found(found.path, found.kind, found.st, mirrored))

    def _walk_folder(self, session: _Session, folder: str) -> list[Found]:
        """A folder that came, with all that is in it. Raises OSError."""
        if self._is_left_out(session.source, folder):
            return []
        if self._is_nested(session, folder):
            return []
        mirrored = self._mirrored(session, folder.rpartition("/")[0], {})
        found = walk.walk(
            session.source_fd,
            session.source,
            self._filters,
            self._unmovable,
            session.migration.nested,
            below=folder,
            mirrored=mirrored,
        )
        return self._sort(session, found)

    def _walk_on(self, session: _Session, now: float) -> list[Found]:
        """A slice of the walk of all; begins one when it is time."""
        if self._walker is None:
            if now < self._next_walk:
                return []
            self._next_walk = float("inf")
            self._walker = walk.walk(
                session.source_fd,
                session.source,
                self._filters,
                self._unmovable,
                session.migration.nested,
                mirrored=walk.markers_above(session.source),
            )
        folders: list[Found] = []
        for _ in range(_SLICE):
            if len(self._settling) >= _MOST_SETTLING or self._throttle.stop.is_set():
                return folders
            found = next(self._walker, None)
            if found is None:
                self._end_walk()
                break
            folders += self._sort(session, [found])
        return folders

    def _sort(self, session: _Session, found: Iterator[Found] | list[Found]) -> list[Found]:
        """Files begin to settle; folders are returned, to be made at once."""
        folders = []
        for one in found:
            if one.kind == "directory":
                folders += [one] if self._filters.takes_all else []
            else:
                self._settle(session, one)
        return folders

    def _settle(self, session: _Session, found: Found) -> None:
        if session.migration.needs(found):
            self._settling.see(found)

    def _end_walk(self) -> None:
        self._walker = None
        self._walked_in_full = True
        pause = self._rule.poll_seconds if self._polling else self._between
        self._next_walk = time.monotonic() + pause
        self._status.add(self._number, reconciles=1)
        self._status.update(self._number, last_reconcile=time.time())

    # ---- session and watch

    def _open_session(self) -> _Session:
        if self._session is None:
            self._session = _Session(self._rule, self._journal, self._throttle, retry_left=not self._walked_in_full)
        return self._session

    def _end_session(self) -> None:
        """Raises JournalError: the rows that could not be written are looked at anew by the next session."""
        session, self._session = self._session, None
        if self._walker is not None:
            self._walker = None  # it walks by the session's descriptor
            self._next_walk = 0.0
        if session is not None:
            try:
                session.close()
            except (OSError, DestinationLost) as error:
                log.warning("%s: could not be brought to its end (%s); the next walk does it", self._name, error)
            finally:
                self._account(session)

    def _keep_watch(self) -> None:
        """See that there are events of the source as it is now, or fall back to polling. Raises OSError."""
        if self._polling or not self.watches:
            return
        source = real_path(config.expanded(self._rule.source))
        with opened_folder(source) as fd:
            st = os.fstat(fd)
            if self._watch is not None and self._watched == (st.st_dev, st.st_ino) and self._watch.is_alive:
                return
            died = self._watch is not None and self._watched == (st.st_dev, st.st_ino)
            self._end_watch()
            try:
                if died:
                    raise EventsUnavailable(f"{source}: watching has ended unexpectedly")
                self._watch = Watch(source, fd, self.wake.set)
                self._watched = (st.st_dev, st.st_ino)
            except EventsUnavailable as error:
                self._polling = True
                log.warning("%s. It is walked every %g s instead.", error, self._rule.poll_seconds)
        self._next_walk = 0.0  # what came before the watch began
        self._status.update(self._number, watch="polling" if self._polling else "events")

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    # ---- what is told

    def _wait_for(self, error: Exception) -> float:
        reason = str(error)
        if isinstance(error, FileNotFoundError):
            reason = f"{error.filename}: is not there"
            self._end_watch()
        self._has_failing_journal = isinstance(error, JournalError)
        if self._has_failing_journal:
            reason = f"{error}; {'work goes on by itself' if self.watches else 'give the command again'}"
        with contextlib.suppress(JournalError):  # the next session meets it again, if it lasts
            self._end_session()
        self._next_walk = 0.0
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        if reason != self.trouble:
            log.warning("%s: waiting: %s", self._name, reason)
            self.trouble = reason
        self._status.update(self._number, state="paused" if isinstance(error, NoRoom) else "waiting", reason=reason)
        return _RETRY_SECONDS

    def _paused(self, reason: str) -> None:
        self.is_paused = bool(reason)
        if reason:
            log.info("%s: paused: %s", self._name, reason)
        self._status.update(self._number, state="paused" if reason else "working", reason=reason)

    def _account(self, session: _Session) -> None:
        """What a migration reports goes to status and log, and what has to wait begins to settle anew."""
        report = session.migration.report
        if session.migrated:
            self._status.add(
                self._number,
                migrated_files=session.migrated,
                migrated_bytes=session.migrated_bytes,
                touched_files=report.touched,
            )
            self._status.update(self._number, last_migrated=time.time())
            log.info("%s: %d migrated, %d sources touched", self._name, session.migrated, report.touched)
        session.migrated = session.migrated_bytes = report.touched = 0
        for note in report.beside:
            log.info("%s: %s: kept as %s, since other content has its name", self._name, note.path, note.reason)
        for note in [*report.failed, *report.left, *report.incomplete]:
            self._problem(note)
        again = {note.path for note in report.later}
        for notes in (report.beside, report.failed, report.left, report.incomplete, report.later):
            notes.clear()
        if again and self._session is session:
            self._look_at(session, again)
        self._status.update(self._number, failed_files=len(self.problems), waiting_files=len(self._settling))

    def _unmovable(self, one: Unmovable) -> None:
        if not one.passing:
            self._problem(Note(path=one.path, reason=one.reason))

    def _problem(self, note: Note) -> None:
        if self.problems.get(note.path) == note.reason:
            return
        if len(self.problems) >= _MOST_PROBLEMS:
            self.problems.clear()
        self.problems[note.path] = note.reason
        log.warning("%s: %s: not migrated as asked: %s", self._name, note.path, note.reason)

    # ---- filters and markers of what events name

    def _is_left_out(self, source: str, folder: str) -> bool:
        """Whether the folder, or one above it, is excluded or a trash."""
        while folder:
            if self._filters.leaves_out(folder) or sources.is_trash(os.path.join(source, folder)):
                return True
            folder = folder.rpartition("/")[0]
        return False

    def _is_nested(self, session: _Session, folder: str) -> bool:
        """Whether the folder lies in a store, or a view of one; people are told. Raises OSError."""
        inside = session.migration.nested.around(folder)
        if inside is not None:
            self._unmovable(Unmovable(inside.path, inside.reason))
        return inside is not None

    def _mirrored(self, session: _Session, folder: str, known: dict[str, str]) -> str:
        """Why the folder is only copied from; empty if nothing says so. ``known``: what was found already."""
        if folder in known:
            return known[folder]
        if not folder:
            reason = walk.markers_above(session.source)
        else:
            reason = self._mirrored(session, folder.rpartition("/")[0], known)
            path = os.path.join(session.source, folder)
            with contextlib.suppress(OSError):
                marked = what_marks(path, set(os.listdir(path)))
                reason = f"{path} is {marked}" if marked else reason
        known[folder] = reason
        return reason
