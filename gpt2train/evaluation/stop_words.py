"""English function words: what LAMBADA's filter takes for no last word.

In: nothing. Out: `STOP_WORDS`, in small letters. The paper (Radford et al. 2019, section 3.3) finds that wrong
answers are often not a last word at all and filters stop words for that; its list is not published. These are the
closed classes of English grammar as any grammar lists them, with their contracted forms, and no word of content.
"""

from __future__ import annotations

_CLASSES = {
    "articles and determiners": "a an the this that these those each every either neither some any no all both half "
    "few fewer many more most much less least several such own same other another enough",
    "personal pronouns": "i me my mine myself you your yours yourself yourselves he him his himself she her hers "
    "herself it its itself we us our ours ourselves they them their theirs themselves one oneself",
    "other pronouns": "who whom whose which what whoever whatever whichever someone somebody something anyone anybody "
    "anything everyone everybody everything nobody nothing none",
    "auxiliaries": "am is are was were be been being have has had having do does did doing done will would shall "
    "should can could may might must ought need dare",
    "prepositions": "about above across after against along among around as at before behind below beneath beside "
    "besides between beyond by despite down during except for from in inside into like near of off on onto out outside "
    "over past per since through throughout till to toward towards under until up upon via with within without",
    "conjunctions": "and but or nor so yet because although though if unless while whereas whether than once lest",
    "adverbs of grammar": "not never always often only just even also too very quite rather again ever then there here "
    "when where why how now still already soon later further almost perhaps maybe however therefore thus",
    "contracted ends": "'s 't 're 've 'll 'd 'm n't s t",
}

STOP_WORDS = frozenset(word for words in _CLASSES.values() for word in words.split())
