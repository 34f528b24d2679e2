"""Examples to begin with: the turns of a dialogue, and what could be said next, one on each line."""

EXAMPLES = {
    "A weekend outdoors": (
        "Hi! How was your weekend?\nGreat, we went hiking in the mountains. Do you like being outdoors?",
        "Yes, I go camping with my brother every summer.\n"
        "Not really, I would rather stay home with a book.\n"
        "The mountains are beautiful in autumn.\n"
        "I had the pasta, it was a bit too salty.\n"
        "My computer broke down yesterday.",
    ),
    "A broken laptop": (
        "My laptop gets so hot that I can't touch it.\nOh no. Is the fan still running?",
        "It makes a loud noise and then it stops.\n"
        "I bought a new laptop last year.\n"
        "It was a hot summer, wasn't it?\n"
        "She is a fan of that band.\n"
        "We adopted a dog from the shelter.",
    ),
    "What to cook": (
        "What are you having for dinner tonight?\n"
        "No idea yet. I only have rice and some vegetables.\n"
        "You could make something spicy with that!",
        "Good idea, I love a hot curry.\n"
        "I usually have breakfast at eight.\n"
        "Rice is grown in many countries.\n"
        "The train was late again this morning.\n"
        "Congratulations on your new job!",
    ),
}
