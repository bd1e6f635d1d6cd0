/* How a node reads blocks out of a peer's memory (docs/decisions/0020), as a model for SPIN.
 *
 * An owner has one slot of two words. Readers ask for the block that the directory says is there, get a lease with the
 * slot's generation, read the words one after another by themselves (the owner neither sees nor stops that), read the
 * generation again, and accept what they have only if it did not change. Anything may happen in between: the lease
 * ends while the reader sleeps, the slot is recycled, the owner restarts with its memory at the same address, the
 * connection breaks, a reader dies. Checksums, which come on top, are left out: this must hold without them.
 *
 * Proved: no block is accepted whose bytes are not all of the block that was asked for; every lease ends.
 * What each rule is for shows without it, and check.py demands that SPIN finds that: NO_GENERATION_CHECK,
 * LATE_GENERATION (bytes change before the generation does) and NO_INCARNATION (a restarted owner counts from the same
 * number again) break the first, NO_EXPIRY the second. NO_PIN (slots under lease are recycled) breaks neither: a lease
 * saves the reader's work, it is not what makes it right. NEVER_ACCEPTED fails because blocks are accepted at all.
 *
 * LEASE_WORDS is what src/flexkv/peer does (docs/decisions/0024): the generation is not the slot's but the lease's, and
 * changes before the lease is over. Then the pin is what makes it right: NO_PIN breaks it, and so do NO_GENERATION_CHECK,
 * NO_INCARNATION and LATE_WORD (the lease is over before its word says so).
 */

#ifndef READERS
#define READERS 2
#endif
#define RECYCLES 1      /* of the slot in the owner's life */
#define RESTARTS 1
#define PER_LIFE 4      /* generations of one life; in truth 2^64, from a random number on */

byte block = 1;         /* which the owner's index says the slot holds; 0: none */
byte word0 = 1, word1 = 1;
byte generation = 0;
byte life = 0;
byte recycles = 0;
byte blocks_made = 1;
bool leased[READERS];
byte life_of_lease[READERS];

#ifdef LEASE_WORDS
byte word_of_lease[READERS];
#define number_of(r) word_of_lease[r]
#else
#define number_of(r) generation
#endif

/* Not atomic: readers may look in between. */
inline end_lease(r) {
#if defined(LEASE_WORDS) && !defined(LATE_WORD)
  word_of_lease[r]++;
#endif
  leased[r] = false;
#if defined(LEASE_WORDS) && defined(LATE_WORD)
  word_of_lease[r]++
#endif
}

#ifdef NO_PIN
#define pinned false
#else
#define pinned (leased[0] || leased[READERS - 1])
#endif

chan requests = [READERS] of { byte, byte };            /* reader, block wanted */
chan grants[READERS] = [1] of { bool, byte, byte };     /* given, generation, life of the connection */

active proctype Owner() {
  byte reader, wanted;
end:
  do
  :: requests ? reader, wanted ->
     atomic {
       if
       :: block == wanted && wanted != 0 && !leased[reader] ->
          leased[reader] = true;
          life_of_lease[reader] = life;
          if
          :: nfull(grants[reader]) -> grants[reader] ! true, number_of(reader), life
          :: full(grants[reader]) -> skip
          fi
       :: else ->
          if
          :: nfull(grants[reader]) -> grants[reader] ! false, 0, life
          :: full(grants[reader]) -> skip
          fi
       fi
     }

  /* The slot is needed for another block. */
  :: atomic { recycles < RECYCLES && !pinned -> recycles++; block = 0 };
#ifndef LATE_GENERATION
     generation++;
#endif
     blocks_made++;
     word0 = blocks_made;
     word1 = blocks_made;
#ifdef LATE_GENERATION
     generation++;
#endif
     block = blocks_made

  /* Killed and started anew: no leases, an empty index, and memory where it was, to which other blocks come. */
  :: atomic { life < RESTARTS ->
       life++;
       recycles = 0;
       block = 0;
       leased[0] = false;
       leased[READERS - 1] = false;
#ifdef NO_INCARNATION
       generation = 0
#else
       generation = life * PER_LIFE
#endif
#ifdef LEASE_WORDS
       ;
       word_of_lease[0] = generation;
       word_of_lease[READERS - 1] = generation
#endif
     };
     blocks_made++;
     word0 = blocks_made;
     word1 = blocks_made;
     block = blocks_made
  od
}

/* Its timer, and what it sees of a connection that ended. */
active proctype Expiry() {
end:
  do
#ifndef NO_EXPIRY
  :: leased[0] -> end_lease(0)
  :: leased[READERS - 1] -> end_lease(READERS - 1)
#endif
  :: false -> skip
  od
}

proctype Reader(byte me) {
  byte wanted, first, second, granted, now_there, connection;
  bool given;
  wanted = block;         /* the directory; it may be stale by the time the owner is asked */
  if
  :: wanted == 0 -> goto done
  :: else -> skip
  fi;
  requests ! me, wanted;
  if
  :: grants[me] ? given, granted, connection
  :: goto done            /* the deadline, or the reader died: whatever was granted ends by itself */
  fi;
  if
  :: !given -> goto done
  :: else -> skip
  fi;
  first = word0;
  second = word1;
  now_there = number_of(me);
  if
#ifdef NO_GENERATION_CHECK
  :: true ->
#else
  :: now_there == granted ->
#endif
#ifdef NEVER_ACCEPTED
     assert(false)
#endif
     assert(first == wanted && second == wanted)
  :: else -> skip
  fi;
  if
  :: goto done            /* died before it could give the lease back */
  :: leased[me] && life_of_lease[me] == life && connection == life -> end_lease(me)
  :: !leased[me] || life_of_lease[me] != life || connection != life -> skip
  fi;
done:
  skip
}

init {
  atomic {
    run Reader(0);
#if READERS > 1
    run Reader(1)
#endif
  }
}

ltl every_lease_ends { [] (leased[0] -> <> !leased[0]) && [] (leased[READERS - 1] -> <> !leased[READERS - 1]) }
