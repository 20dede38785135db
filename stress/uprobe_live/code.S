/*
 * The functions that are probed: position-independent, one every 64 bytes, each with another first instruction
 * and the same body. The body asks (%r15, target.c:next) what to do until it is told to return:
 *
 *     rax = 0              return
 *     rax = f, rdx = 0     call f
 *     rax = f, rdx = 1     leave this frame and jump to f (a tail call)
 *
 * A frame is the return address and the saved rbp: 16 bytes, whatever the function.
 */
	.text

	.macro BODY
1:	mov	%rsp, %rdi
	call	*%r15
	test	%rax, %rax
	jz	2f
	test	%rdx, %rdx
	jnz	3f
	call	*%rax
	jmp	1b
2:	pop	%rbp
	ret
3:	pop	%rbp
	jmp	*%rax
	.endm

	.macro FUNC letter
	.org	64 * (\letter - 'a')
	.endm

	FUNC 'a'		/* emulated: push */
	push	%rbp
	BODY

	FUNC 'b'		/* emulated: nop */
	nop
	push	%rbp
	BODY

	FUNC 'c'		/* emulated: push of a register that needs a prefix */
	push	%r12
	add	$8, %rsp
	push	%rbp
	BODY

	FUNC 'd'		/* stepped out of line */
	lea	8(%rsp), %rax
	push	%rbp
	BODY

	FUNC 'e'		/* emulated: a short jump */
	jmp	9f
	int3
9:	push	%rbp
	BODY

	FUNC 'f'		/* emulated: a call */
	call	9f
9:	add	$8, %rsp
	push	%rbp
	BODY

	FUNC 'g'		/* stepped, with an address relative to rip */
	lea	0(%rip), %rax
	push	%rbp
	BODY

	FUNC 'h'		/* a long nop */
	.byte	0x0f, 0x1f, 0x44, 0x00, 0x00
	push	%rbp
	BODY

	FUNC 'i'		/* a longer one */
	.byte	0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00
	push	%rbp
	BODY

	FUNC 'j'		/* nothing but a return, which is stepped */
	ret

	FUNC 'k'		/* emulated: a conditional jump, whose two ways lead to one place */
	jo	8f
8:	push	%rbp
	BODY

	FUNC 'l'		/* setjmp: next() returns here again when something below says longjmp */
	push	%rbp
	mov	%rsp, %rdi
	call	*%r14
	BODY

	/* What must not be probed, or not everywhere; one every 16 bytes, never called. */
	.org	0xc00
	int3
	.org	0xc10
	lock incl (%rax)
	.org	0xc20
	hlt
	.org	0xc30
	in	$1, %al
	.org	0xc40
	outb	%al, %dx
	.org	0xc50
	cli
	.org	0xc60
	int	$0x80
	.org	0xc70
	syscall
	.org	0xc80
	.byte	0x06			/* push %es: no instruction in 64-bit code */
	.org	0xc90
	.byte	0x0f, 0x0b		/* ud2 */
	.org	0xca0
	.byte	0xf0			/* a lock prefix before a nop */
	nop
	.org	0xcb0
	rep movsb
	.org	0xcc0
	.byte	0xf3, 0x90		/* pause */
	.org	0xcd0
	iretq
	.org	0xce0
	.byte	0xea, 0, 0, 0, 0, 0, 0	/* a far jump: none in 64-bit code */
	.org	0xcf0
	mov	%ss, %eax
	.org	0xd00
	vzeroupper
	.org	0xd10
	.byte	0xf1			/* int1 */
	.org	0xd20
	mov	%cr0, %rax
	.org	0xd30
	.byte	0x2e, 0x90		/* a nop with a segment prefix */
	.org	0xd40
	insb
	.org	0xd50
	outsl
	.org	0xd60
	sti
	.org	0xd70
	.byte	0x66, 0x55		/* push %bp: 16 bits */
	.org	0xd80
	.byte	0xce			/* into: none in 64-bit code */
	.org	0xd90
	.byte	0x62, 0xf1, 0x7c, 0x48, 0x28, 0xc1	/* vmovaps %zmm1, %zmm0 */
	.org	0xda0
	endbr64
	.org	0x1000
